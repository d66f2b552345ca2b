"""Validation losses: a worker's curve, and whether workers agree that it got worse."""

import json
import math
from dataclasses import replace

import msgpack
import pytest

from consumers.early_warning import Judged, counts_since, judge, reason_to_hold
from fedmoe.protocol.balance import LEAST_ACTIVE_VERSIONS
from fedmoe.protocol.records import Decided
from fedmoe.protocol.rollback import RolledBack
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.update import Header, UpdateId
from fedmoe.protocol.validation import (
    IN_A_ROW,
    MARGIN,
    MAX_LOSS,
    Curve,
    Measured,
    advance,
    best_version,
    checked,
)
from tests.record_cases import DECIDED, HEADER

HOLDING = RuleSet().changed({"on_worse": "hold"})


def after(*losses: float, since: int = 0, first: int = 1, rows_set: str = "a") -> Curve:
    """The curve of these losses, of one version after another."""
    curve: Curve | None = None
    for version, loss in enumerate(losses, first):
        measured = Measured(loss=loss, version=version, rows=8, rows_set=rows_set)
        curve = advance(curve, measured, since=since)
    assert curve is not None
    return curve


def decided(*, version: int = 10, **curves: Curve) -> dict[str, Decided]:
    """Workers with these curves, whose last update was decided at this version."""
    return {
        name: Decided(
            id=UpdateId("1-0123abcd", 1), how="applied", version=version, validation=curve.to_json()
        )
        for name, curve in curves.items()
    }


WORSE = after(2.0, 1.0, *[1.0 + 2 * MARGIN] * IN_A_ROW)


def test_curve_keeps_best_and_last() -> None:
    """Losses within the margin are near the best; one above is not yet worse, two in a row are."""
    assert after(2.0).trend == "best"
    near = after(2.0, 1.0, 1.0 + MARGIN / 2)
    assert (near.best, near.best_version, near.last, near.last_version) == (1.0, 2, 1.0 + MARGIN / 2, 3)
    assert near.trend == "near the best"
    assert after(2.0, 1.0, 1.0 + 2 * MARGIN).trend == "above the best"
    assert WORSE.is_worse
    assert after(2.0, 1.0, 1.1, 1.0, 1.1).worse == 1  # not in a row
    assert not after(1.0, 1.1, 0.9).is_worse


def test_only_a_later_version_counts() -> None:
    """The same version measured again, or an earlier one, is no second measurement."""
    curve = after(1.0, 1.1)
    for version in (1, 2):
        assert advance(curve, Measured(loss=9.0, version=version, rows=8, rows_set="a"), since=0) == curve


def test_other_rows_are_another_curve() -> None:
    """Their losses cannot be compared."""
    measured = Measured(loss=9.0, version=7, rows=9, rows_set="b")
    assert advance(WORSE, measured, since=0) == Curve(
        rows=9, rows_set="b", best=9.0, best_version=7, last=9.0, last_version=7
    )


def test_release_accepts_the_losses_as_they_are() -> None:
    """What was measured before it changes nothing; the first one after it is the new best."""
    early = Measured(loss=1.5, version=5, rows=8, rows_set="a")
    assert advance(WORSE, early, since=6) == WORSE
    later = advance(WORSE, replace(early, version=6), since=6)
    assert later is not None
    assert (later.best, later.best_version, later.worse, later.since) == (1.5, 6, 0, 6)


def test_rollback_accepts_the_losses_of_the_version_gone_back_to() -> None:
    """They are compared with what is measured from then on, not with the best of the versions that are gone."""
    back = RolledBack().and_also(2, 5)  # version 6 has the weights of version 2
    assert counts_since(HOLDING, back) == 6
    assert counts_since(HOLDING.hold("why").release(9), back) == 9
    assert reason_to_hold(decided(a=WORSE, b=WORSE), 10, HOLDING, back) == ""
    head = replace(DECIDED, validation=WORSE.to_json())
    measured = Measured(loss=8.0, version=7, rows=8, rows_set="a").fields
    judged = judge(replace(HEADER, **measured), head, 8, HOLDING, back)
    curve = Curve.from_json(judged.curve)
    assert curve is not None
    assert (curve.best, curve.best_version, curve.since, judged.got_worse) == (8.0, 7, 6, "")


def test_two_workers_hold_an_expert_and_one_does_not() -> None:
    """However bad the loss of one is; and only if the rules say so."""
    one, two = decided(a=WORSE), decided(a=WORSE, b=WORSE)
    assert reason_to_hold(one, 10, HOLDING) == ""
    assert reason_to_hold(one | decided(b=after(1.0, 1.1)), 10, HOLDING) == ""
    assert "a: 1.06" in reason_to_hold(two, 10, HOLDING)
    assert reason_to_hold(two, 10, RuleSet()) == ""
    assert reason_to_hold(two, 10, HOLDING.hold("why")) == ""
    assert reason_to_hold(two, 10, HOLDING.hold("why").release(10)) == ""  # they measured before the release
    assert reason_to_hold(two, 10 + LEAST_ACTIVE_VERSIONS + 1, HOLDING) == ""  # they left


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"val_loss": math.nan}, "a validation loss of nan"),
        ({"val_loss": math.inf}, "a validation loss of inf"),
        ({"val_loss": -1.0}, "a validation loss of -1"),
        ({"val_loss": 2 * MAX_LOSS}, "a validation loss of 2000"),
        ({"val_loss": "low"}, "a validation loss of nan"),
        ({"val_loss": [{}]}, "a validation loss of nan"),
        ({"val_version": 11}, "at version 11, but the expert is at version 10"),
        ({"val_version": -1}, "at version None"),
        ({"val_version": True}, "at version None"),
        ({"val_rows": 0}, "on 0 rows"),
        ({"val_rows": "x"}, "on None rows"),
    ],
)
def test_odd_loss_is_left_out_and_refuses_nothing(fields: dict[str, object], said: str) -> None:
    """Anybody may have written it."""
    content = msgpack.unpackb(HEADER.pack()) | {"val_loss": 1.0, "val_version": 3, "val_rows": 8} | fields
    header = Header.unpack(msgpack.packb(content))
    judged = judge(header, DECIDED, 10, RuleSet())
    assert said in judged.odd
    assert (judged.measured, judged.curve) == (None, DECIDED.validation)
    assert Header.unpack(header.pack()).val_rows == header.val_rows


def test_header_without_a_loss_is_as_before() -> None:
    """Byte for byte what a FedMoE without validation wrote, and the curve is carried on."""
    assert not any(name.startswith("val_") for name in msgpack.unpackb(HEADER.pack()))
    head = replace(DECIDED, validation=WORSE.to_json())
    assert judge(HEADER, head, 10, RuleSet()) == Judged(curve=head.validation)
    assert "validation" not in DECIDED.to_json()
    later = head.to_json().replace('"best"', '"added_later": 1, "best"')
    read = Decided.from_json(later.encode())
    assert "added_later" in read.to_json()  # else another release would compute another stamp
    assert read.curve == WORSE


def test_worker_is_told_of_once() -> None:
    """When its loss becomes worse, not at each measurement."""

    def told(curve: Curve, loss: float) -> str:
        fields = Measured(loss=loss, version=curve.last_version + 1, rows=8, rows_set="a").fields
        head = replace(DECIDED, validation=curve.to_json())
        return judge(replace(HEADER, **fields), head, 99, RuleSet()).got_worse

    almost = after(1.0, *[1.1] * (IN_A_ROW - 1))
    assert told(almost, 1.1) == f"1.1000 at version {IN_A_ROW + 1}, best 1.0000 at version 1"
    assert told(almost, 1.0) == ""
    assert told(WORSE, 1.1) == ""


def test_best_version_is_that_of_a_majority() -> None:
    """One worker, whatever it claims, does not choose it among three."""
    curves = {"a": after(1.0, 1.1), "b": after(3.0, 2.0, 2.5), "c": after(9.0, 8.0, 7.0, 6.0)}
    assert best_version(curves) == 2
    assert best_version({}) is None
    assert checked(None, None, None, "", at_most=3) is None


def test_rules_say_whether_an_expert_is_held() -> None:
    """A hold and a release are changes of rules; an expert that is held, or may be, needs aggregators that know it."""
    plain = RuleSet()
    assert not {"on_worse", "held", "released", "requires"} & set(json.loads(plain.to_json()))
    held = plain.hold("why")
    assert (held.number, held.held, held.requires) == (2, "why", "hold")
    assert RuleSet.from_json(held.to_json()) == held
    assert plain.differences(held) == "held: why"
    released = held.release(7)
    assert (released.number, released.held, released.released, released.requires) == (3, "", 7, "")
    assert held.differences(released) == "released"
    assert plain.differences(released) == "released"  # held and released between two looks
    assert released.differences(plain) == ""  # an expert that was created again
    assert HOLDING.requires == "hold"
    assert HOLDING.changed({"on_worse": "warn"}).requires == ""
    assert held.changed({"lr": 0.5}).held == "why"
    assert held.as_first() == plain
