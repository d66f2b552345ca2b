"""producers.outbox: what comes next is decided by the state alone, in the order that the protocol needs."""

from dataclasses import replace

import pytest

from fedmoe.protocol.update import UpdateId
from producers.outbox import Outbox, Prepare, Talk

FIRST, SECOND = UpdateId("1-00000001", 1), UpdateId("1-00000001", 2)
BOOLS = (False, True)


def test_the_life_of_an_update() -> None:
    """Made, saved, sent, announced, looked for, decided."""
    box = Outbox()
    assert box.prepare(None, is_due=True, must_checkpoint=False) is Prepare.MAKE
    box = box.made(must_save=True)
    assert box.prepare(FIRST, is_due=True, must_checkpoint=True) is Prepare.SAVE
    assert box.talk(FIRST) is Talk.HOLD
    box = box.saved()
    assert box.prepare(FIRST, is_due=True, must_checkpoint=False) is Prepare.NOTHING
    assert box.talk(FIRST) is Talk.ANNOUNCE
    box = box.announcing(FIRST).announced("5-1")
    assert box.talk(FIRST) is Talk.POLL
    box = box.pulled()
    assert box.talk(None) is Talk.NOTHING
    assert box.talk(SECOND) is Talk.ANNOUNCE


def test_nothing_is_announced_before_it_is_on_disk() -> None:
    """Whatever else is so."""
    for entry in (None, "5-1"):
        for sent in (None, FIRST, SECOND):
            box = Outbox(entry=entry, sent=sent, must_save=True)
            assert box.talk(FIRST) is Talk.HOLD
            assert box.prepare(FIRST, is_due=True, must_checkpoint=True) is Prepare.SAVE


def test_what_was_sent_is_looked_for_before_it_is_sent_again() -> None:
    """The reply was lost, or the entry is gone: a decision may have taken its payload away."""
    box = Outbox().announcing(FIRST)  # and the reply never came
    assert box.talk(FIRST) is Talk.LOOK
    assert box.announced("5-1").lost_sight().talk(FIRST) is Talk.LOOK
    assert box.talk(SECOND) is Talk.ANNOUNCE


def test_a_resumed_worker_looks_at_redis_first() -> None:
    """It makes nothing and announces nothing before."""
    box = Outbox(must_pull=True)
    for first in (None, FIRST):
        assert box.talk(first) is Talk.PULL
        assert box.prepare(first, is_due=True, must_checkpoint=False) is Prepare.NOTHING
    assert box.pulled().prepare(None, is_due=True, must_checkpoint=False) is Prepare.MAKE


@pytest.mark.parametrize("is_due", BOOLS)
def test_at_most_one_update_is_undecided(is_due: bool) -> None:
    assert Outbox().prepare(FIRST, is_due=is_due, must_checkpoint=False) is Prepare.NOTHING
    assert (Outbox().prepare(None, is_due=is_due, must_checkpoint=False) is Prepare.MAKE) == is_due


def test_a_copy_for_a_checkpoint_becomes_no_update() -> None:
    """The copy under way was not consumed: the next update would count its steps twice."""
    box = replace(Outbox(), checkpointing=True)
    assert box.prepare(None, is_due=True, must_checkpoint=True) is Prepare.CHECKPOINT
