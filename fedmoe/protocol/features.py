"""Features: named abilities beyond the protocol version, so that releases of one protocol can still differ. Pure.

A record's field `requires` names the features its reader must know. The field `knows` of an expert's meta and of a
worker's heartbeat names the features its writer knows. Names are separated by spaces. A reader that lacks a feature
reports it in one sentence, before it trains or commits.
"""

from fedmoe.errors import ProtocolError

HOLD = "hold"  # an expert whose rules say that it is held applies no updates
SERVER_OPTIMIZER = "server_optimizer"  # the step of an update may depend on what past updates left
ROLLBACK = "rollback"  # updates that were trained on rolled-back versions are refused, and workers drop such progress
TAIL = "tail"  # the key `weights` lags behind meta by the updates in the tail
COPIES = "copies"  # the parts of the tail's updates are strings, copied from their payloads
PARTS = "parts"  # weights above 512 MiB lie in several strings
QUICK_DIGESTS = "quick_digests"  # the parts of an update have digests by XXH3
FEATURES: frozenset[str] = frozenset(
    {COPIES, HOLD, PARTS, QUICK_DIGESTS, ROLLBACK, SERVER_OPTIMIZER, TAIL}
)  # those that this FedMoE knows
UPDATES_REQUIRE = ""  # features that an aggregator must know to decide this FedMoE's updates
MAX_FEATURE_CHARS = 32
SHOWN_FEATURES = 5


def features_text() -> str:
    """The features that this FedMoE knows, separated by spaces as in `requires` and `knows`."""
    return " ".join(sorted(FEATURES))


def with_feature(requires: str, feature: str, is_needed: bool) -> str:
    """The features in `requires`, with or without this one."""
    names = set(requires.split()) - {feature}
    return " ".join(sorted(names | {feature} if is_needed else names))


def lacking(requires: str, known: str | None = None) -> list[str]:
    """At most five features of `requires` that `known` lacks (None: this FedMoE's features), escaped for display."""
    odd = set(requires.split()) - (FEATURES if known is None else set(known.split()))
    return [ascii(name[:MAX_FEATURE_CHARS])[1:-1] for name in sorted(odd)[:SHOWN_FEATURES]]


def check_requires(requires: str, what: str) -> None:
    """Raise ProtocolError if the record needs a feature that this FedMoE does not know."""
    if odd := lacking(requires):
        raise ProtocolError(
            f"{what} needs {', '.join(odd)}, which the FedMoE on this machine does not know: upgrade the FedMoE on "
            "this machine",
            about="requires",
        )
