"""Rules that have no effect, because another rule or the expert leaves them out. Pure."""

from collections.abc import Collection, Iterator

from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.rules import ADAPTIVE, BY_DOMAIN, NESTEROV, RuleSet

_DECAYING = ("polynomial", "hinge")
# Rule -> the rule that it depends on, and the values of that with which it has an effect.
_NEEDS = {
    "decay_a": ("decay", _DECAYING),
    "decay_b": ("decay", ("hinge",)),
    "server_momentum": ("server_optimizer", (NESTEROV,)),
    "server_beta2": ("server_optimizer", (ADAPTIVE,)),
    "server_epsilon": ("server_optimizer", (ADAPTIVE,)),
}


def without_effect(expert: str, rules: RuleSet, named: Collection[str]) -> Iterator[str]:
    """A sentence on each of the rules `named` (as in `RuleSet.settings`) that has no effect on the expert now."""
    values = rules.settings()
    for name, (other, needed) in _NEEDS.items():
        if name in named and values[other] not in needed:
            yield f"{expert}: {name} has no effect until {other} is {' or '.join(needed)}; it is {values[other]}"
    if "max_length" in named and expert == GATEWAY:
        yield (
            f"{expert}: max_length counts for workers that train the {GATEWAY} alone; one that trains its expert too "
            "cuts its rows as the expert's max_length says"
        )
    is_balanced = rules.aggregation.balance == BY_DOMAIN
    if "balance" in named and is_balanced and expert != GATEWAY:
        yield f"{expert}: balance has no effect, because only the expert {GATEWAY!r} has workers of several domains"
    # An update counts min(1, gain × decay × weight).
    weight_varies = is_balanced and expert == GATEWAY
    if "gain" in named and values["gain"] > 1 and values["decay"] not in _DECAYING and not weight_varies:
        yield (
            f"{expert}: a gain above 1 has no effect until decay is {' or '.join(_DECAYING)}; it is {values['decay']}"
        )
