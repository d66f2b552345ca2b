"""protocol.effect: it names each rule that has no effect, and no other."""

import pytest

from fedmoe.protocol.effect import without_effect
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.rules import RuleSet


@pytest.mark.parametrize(
    ("expert", "rules", "sentences"),
    [
        ("a", {"lr": 0.5, "gain": 2.0, "decay_a": 2.0, "server_optimizer": "nesterov"}, []),
        ("a", {"balance": "worker"}, []),
        (GATEWAY, {"balance": "domain"}, []),
        ("a", {"balance": "domain"}, ["only the expert 'gateway' has workers of several domains"]),
        ("a", {"server_momentum": 0.9}, ["no effect until server_optimizer is nesterov; it is sgd"]),
        ("a", {"server_momentum": 0.9, "server_optimizer": "nesterov"}, []),
        (
            "a",
            {"server_beta2": 0.9, "server_epsilon": 0.1, "server_optimizer": "nesterov"},
            ["server_beta2 has no effect until server_optimizer is adaptive", "server_epsilon has no effect"],
        ),
        ("a", {"decay_b": 2.0}, ["decay_b has no effect until decay is hinge; it is polynomial"]),
        ("a", {"decay_b": 2.0, "decay_a": 2.0, "decay": "hinge"}, []),
        ("a", {"decay_a": 2.0, "decay": "constant"}, ["decay is polynomial or hinge; it is constant"]),
        ("a", {"gain": 2.0, "decay": "constant"}, ["a gain above 1 has no effect until decay is"]),
        ("a", {"gain": 0.5, "decay": "constant"}, []),
        (GATEWAY, {"gain": 2.0, "decay": "constant", "balance": "domain"}, []),
    ],
)
def test_rules_without_effect(expert: str, rules: dict[str, object], sentences: list[str]) -> None:
    said = list(without_effect(expert, RuleSet().changed(rules), rules))
    assert len(said) == len(sentences)
    for one, part in zip(said, sentences, strict=True):
        assert one.startswith(f"{expert}: ")
        assert part in one


def test_only_what_is_named_is_said() -> None:
    """Rules that were set before, with another optimizer, are kept for it."""
    rules = RuleSet().changed({"server_momentum": 0.9, "balance": "domain"})
    assert list(without_effect("a", rules, {"lr"})) == []
