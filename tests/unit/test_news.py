"""producers.news: each line says what happened and names the expert."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedmoe.protocol.rollback import Interval, RolledBack
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.update import UpdateId
from producers.ledger import Change, Ledger
from producers.news import Fixed, change_of_rules, tell_diverged, tell_drop
from tests.federation import first_meta, small_spec

UPDATES = UpdateId("1-a", 1), UpdateId("1-a", 2)
RULES = RuleSet()


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (RULES, RULES.hold("why").release(7), "rules 3 are in force, they were 1: released"),
        (RULES.hold("why"), RULES.hold("why").release(7), "rules 3 are in force, they were 2: released"),
        (RULES.hold("why").release(7), RULES, "rules 1 are in force, they were 3: the same rules as before"),
        (
            RULES,
            replace(RULES, number=3),
            "rules 3 are in force, they were 1: the same rules as before",
        ),
        (
            RULES,
            replace(RULES, number=2, unknown='{"x": 1}'),
            "rules 2 are in force, they were 1: a rule changed that this FedMoE does not know",
        ),
    ],
)
def test_rules_that_differ_in_no_value_are_told_in_plain_words(
    before: RuleSet, now: RuleSet, said: str
) -> None:
    """After hold and release, after the expert is created again, after a change is undone, from a later release."""
    assert change_of_rules(before, now, Fixed()) == said


def ledger(**meta: object) -> Ledger:
    return Ledger(base=torch.zeros(2), meta=first_meta(small_spec(), **meta), run="1-a")


ROLLED_BACK = ledger(version=6, rolled_back=RolledBack((Interval(3, 5),)))
GOES_ON = "and continues from the expert's current weights"


@pytest.mark.parametrize(
    ("tell", "steps", "said"),
    [
        (
            tell_drop(Change(replace=True, rolled_back=True), ROLLED_BACK, "gateway"),
            1,
            (
                "an operator rolled expert 'gateway' back to version 3, version 6 has its weights: this worker drops 1 "
                f"step that it trained on what was rolled back, {GOES_ON}"
            ),
        ),
        (
            tell_drop(Change(replace=True, dropped=UPDATES), ledger(), "gateway"),
            3,
            (
                "the history of expert 'gateway' is not the one that this worker knew (an operator created the expert "
                f"from zero): this worker drops 2 undecided updates and 3 steps since, {GOES_ON}"
            ),
        ),
        (
            tell_drop(Change(replace=True, dropped=UPDATES[:1], position="4"), ledger(), "gateway"),
            1,
            (
                "the history of expert 'gateway' is not the one that this worker knew (this worker was restored from "
                f"an old checkpoint): this worker drops 1 undecided update and 1 step since, {GOES_ON}"
            ),
        ),
        (
            tell_diverged(5000.0, 1, 1000.0, "gateway"),
            2,
            (
                "the training of expert 'gateway' diverged: 1 step changed the adapter by a norm of 5e+03, the bound "
                "is 1000; this worker drops 3 steps, and continues from the expert's weights (is the learning rate "
                "too high?)"
            ),
        ),
    ],
)
def test_what_is_dropped_names_its_expert(
    tell: Callable[[int], None], steps: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The training thread logs it, whose lines name no expert by themselves."""
    tell(steps)
    assert caplog.messages == [said]
