"""What a reader must know beyond the protocol, by name, so that releases of one protocol can still differ. Pure.

A record names in its field `requires` what its reader must know. An expert's meta and a worker's heartbeat name in
`knows` what their writer knows. All are names separated by spaces. A reader that lacks one says so in one sentence,
before it trains or commits.
"""

from fedmoe.errors import ProtocolError

FEATURES: frozenset[str] = frozenset()  # what this FedMoE knows
UPDATES_REQUIRE = ""  # what an aggregator must know to decide the updates of this FedMoE
MAX_FEATURE_CHARS = 32
SHOWN_FEATURES = 5


def features_text() -> str:
    """What this FedMoE knows, as `requires` and `knows` spell it: names separated by spaces."""
    return " ".join(sorted(FEATURES))


def lacking(requires: str, known: str | None = None) -> list[str]:
    """The features that `requires` names and `known` does not (None: this FedMoE), safe to show, at most five."""
    odd = set(requires.split()) - (FEATURES if known is None else set(known.split()))
    return [ascii(name[:MAX_FEATURE_CHARS])[1:-1] for name in sorted(odd)[:SHOWN_FEATURES]]


def check_requires(requires: str, what: str) -> None:
    """Raise ProtocolError if the record needs something that this FedMoE does not know."""
    if odd := lacking(requires):
        raise ProtocolError(
            f"{what} needs {', '.join(odd)}, which the FedMoE on this machine does not know: upgrade the FedMoE on "
            "this machine"
        )
