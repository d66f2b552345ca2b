"""protocol.rules: a rule set survives its JSON, refuses what cannot work, and changes by the names of its options."""

import contextlib
import dataclasses
import json
from typing import Any

import click
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedmoe.cli import aggregator, expert
from fedmoe.errors import FedMoEError, ProtocolError, SettingsError, SpecError
from fedmoe.protocol.rules import AggregationRules, RuleSet, TrainingSettings
from fedmoe.protocol.staleness import Decay
from fedmoe.util.setting import declared
from tests.errors import raises
from tests.strategies import rule_sets

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(rule_sets())
def test_rule_set_survives_json(rules: RuleSet) -> None:
    """With the same text."""
    again = RuleSet.from_json(rules.to_json())
    assert again == rules
    assert again.to_json() == rules.to_json()


@given(rule_sets(), rule_sets())
def test_any_rules_can_be_changed_to_any_others(before: RuleSet, wanted: RuleSet) -> None:
    """Named by their options, all at once; with the next number, unless nothing differs."""
    after = before.changed(wanted.settings())
    assert after.settings() == wanted.settings()
    assert after.number == before.number + (before.settings() != wanted.settings())
    assert (before.differences(after) == "") == (after == before)


def test_differences_are_for_people() -> None:
    """Old and new value of each rule that changes."""
    before = RuleSet(aggregation=AggregationRules(max_staleness=7))
    after = before.changed({"lr": 0.5, "sync_interval": 30.0, "max_staleness": "auto", "decay": "hinge"})
    assert (
        before.differences(after)
        == "lr 1 -> 0.5, decay polynomial -> hinge, max_staleness 7 -> auto, sync_interval 10 -> 30"
    )
    assert after.aggregation == AggregationRules(lr=0.5, decay=Decay(kind="hinge"))
    assert (after.number, after.sync_interval_s) == (2, 30.0)


def test_change_keeps_what_a_later_release_wrote() -> None:
    """Of the rule set, its sections and the decay."""
    content = json.loads(RuleSet().to_json())
    content["added_later"] = {"x": [1]}
    content["training"]["added_later"] = 2
    content["aggregation"]["decay"]["added_later"] = 3
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert RuleSet.from_json(text).to_json() == text
    changed = json.loads(RuleSet.from_json(text).changed({"lr": 0.5}).to_json())
    assert changed == content | {"number": 2, "aggregation": content["aggregation"] | {"lr": 0.5}}


@pytest.mark.parametrize(
    ("change", "about"),
    [
        ({"lr": 0.0}, "lr"),
        ({"decay": "linear"}, "decay"),
        ({"decay_a": -1.0}, "decay_a"),
        ({"max_staleness": -1}, "max_staleness"),
        ({"sync_interval": float("nan")}, "sync_interval"),
        ({"batch_size": 0}, "batch_size"),
        ({"weight_decay": float("inf")}, "weight_decay"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"lr": 1e39}, "lr"),
        (
            {"max_length": 10**400},
            "max_length",
        ),
        ({"batch_size": True}, "batch_size"),
        ({"rank": 8}, "rank"),
    ],
)
def test_change_that_breaks_a_bound_is_refused(change: dict[str, Any], about: str) -> None:
    """By the name of the rule."""
    with raises(SettingsError, about=about):
        RuleSet().changed(change)


@given(st.text(max_size=50) | json_values.map(json.dumps))
@example("[" * 100_000)
@example("9" * 5000)
def test_garbage_is_a_spec_error(text: str) -> None:
    """Anything that is no rule set raises SpecError and nothing else."""
    with pytest.raises(SpecError):
        RuleSet.from_json(text)


@given(st.sampled_from(sorted(json.loads(RuleSet().to_json()))), json_values)
@example("sync_interval_s", 10**400)
@example("aggregation", json.loads(RuleSet().to_json())["aggregation"] | {"lr": 10**400})
@example("aggregation", {"decay": {"kind": "hinge", "a": 10**400, "b": True}})
def test_odd_field_is_refused_or_harmless(field: str, value: object) -> None:
    """Whatever stands in a field: rules that can be used, or one of FedMoE's own errors."""
    content = json.loads(RuleSet().to_json()) | {field: value}
    with contextlib.suppress(FedMoEError):
        rules = RuleSet.from_json(json.dumps(content))
        assert RuleSet.from_json(rules.to_json()) == rules


def test_rules_that_need_more_are_refused_with_what_to_do() -> None:
    """They could not be gone by."""
    text = dataclasses.replace(RuleSet(), requires="momentum").to_json()
    with raises(ProtocolError, about="requires"):
        RuleSet.from_json(text)


@pytest.mark.parametrize(
    ("settings", "bad", "about"),
    [
        (AggregationRules, {"lr": 0.0}, "lr"),
        (AggregationRules, {"max_norm": float("inf")}, "max_norm"),
        (AggregationRules, {"max_staleness": -1}, "max_staleness"),
        (TrainingSettings, {"batch_size": 1.5}, "batch_size"),
        (TrainingSettings, {"accumulate": 0}, "accumulate"),
        (TrainingSettings, {"warmup_steps": -1}, "warmup_steps"),
        (TrainingSettings, {"max_length": 7}, "max_length"),
        (
            TrainingSettings,
            {"weight_decay": -0.1},
            "weight_decay",
        ),
        (TrainingSettings, {"learning_rate": 0.0}, "learning_rate"),
        (RuleSet, {"sync_interval_s": 0.0}, "sync_interval"),
        (RuleSet, {"number": 0}, "number"),
    ],
)
def test_rules_that_cannot_work_are_refused(settings: type, bad: dict[str, Any], about: str) -> None:
    """Each rule has its bounds."""
    with raises(SettingsError, about=about):
        settings(**bad)


@pytest.mark.parametrize(
    ("chosen", "workers", "bound"),
    [
        (None, 0, 256),
        (None, 64, 256),
        (None, 65, 260),
        (None, 400, 1600),
        (3, 400, 3),
        (0, 400, 0),
        (999, 1, 999),
    ],
)
def test_staleness_bound_grows_with_the_workers_unless_it_was_chosen(
    chosen: int | None, workers: int, bound: int
) -> None:
    """The larger of 256 and four times the workers."""
    assert AggregationRules(max_staleness=chosen).staleness_bound(workers) == bound


@pytest.mark.parametrize("command", [aggregator.run, expert.set_rules, expert.add])
def test_every_rule_is_an_option(command: click.Command) -> None:
    """Of whatever creates or changes an expert, with the help and the name under which it is shown."""
    options = {option.name: option for option in command.params if isinstance(option, click.Option)}
    for rule in declared(RuleSet):
        assert str(options[rule.name].help).startswith(rule.said.help)
    assert list(RuleSet().settings()) == [rule.name for rule in declared(RuleSet)]


def test_defaults_of_a_new_expert_are_said() -> None:
    """In the words of a person, where the value does not tell."""
    shown = {
        option.name: str(option.help) for option in aggregator.run.params if isinstance(option, click.Option)
    }
    assert shown["lr"].endswith("[default: 1.0]")
    assert shown["max_staleness"].endswith("[default: auto]")
    assert shown["max_norm"].endswith("[default: ten times the initial adapter's norm]")
