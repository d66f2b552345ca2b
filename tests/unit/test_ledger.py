"""The worker's books: each unit of training in `local` exactly once, under any order of events."""

from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedmoe.errors import NameTakenError, UpdateError
from fedmoe.protocol.records import Decided, Meta
from fedmoe.protocol.rollback import RolledBack
from fedmoe.protocol.update import UpdateId, make_run
from fedmoe.protocol.validation import Measured
from producers.ledger import HeadPlace, Ledger, Trained, locate
from tests.errors import raises
from tests.federation import delta_of

UNITS = 48
RUN = make_run(3, "00000003")


def meta_of(number: int, lineage: str = "first") -> Meta:
    """Meta whose commit is `number`."""
    return Meta(
        lineage=lineage, commit=f"c{number}", weights_commit=f"w{number}", spec="spec", version=max(0, number)
    )


def decision(update: UpdateId, how: str = "applied") -> Decided:
    return Decided(id=update, how=how, version=1)


class Books(RuleBasedStateMachine):
    """A ledger against a server that applies, refuses, is moved by others, and goes back in time.

    Step k of the training adds 1 to value k, so a value of 0 is a step lost and a value of 2 a step doubled. Values
    of other workers are counted at the end of the vector.
    """

    @initialize(keep_s=st.sampled_from([0.0, 3.0, 1e9]))
    def begin(self, keep_s: float) -> None:
        self.weights = torch.zeros(2 * UNITS)
        self.head: Decided | None = None
        self.history = [(self.weights.clone(), self.head)]
        self.commits = 0
        self.ledger = Ledger(base=self.weights.clone(), meta=meta_of(0), run=RUN, keep_decided_s=keep_s)
        self.local = self.weights.clone()
        self.trained = 0
        self.in_cut: dict[UpdateId, list[int]] = {}
        self.uncut: list[int] = []
        self.refused: set[int] = set()
        self.may_be_lost: set[int] = set()
        self.others = 0
        self.now = 0.0

    def commit(self) -> None:
        self.commits += 1
        self.history.append((self.weights.clone(), self.head))

    @precondition(lambda self: self.trained < UNITS)
    @rule()
    def train(self) -> None:
        self.local[self.trained] += 1
        self.uncut.append(self.trained)
        self.trained += 1

    @precondition(lambda self: not self.ledger.queue and self.uncut)
    @rule()
    def cut(self) -> None:
        update = self.ledger.make_update(
            self.ledger.cut(self.local, "fp32"), Trained(steps=1), fingerprint="f"
        )
        self.in_cut[update.id], self.uncut = self.uncut, []

    @precondition(lambda self: self.ledger.queue)
    @rule(refuse=st.booleans())
    def decide(self, refuse: bool) -> None:
        """The aggregator decides the update in flight, if it is the head's successor."""
        update = self.ledger.queue[0]
        if update.header.prev != (self.head.id if self.head else None):
            return
        if refuse:
            self.refused |= set(self.in_cut[update.id])
        else:
            self.weights = self.weights + delta_of(update, 2 * UNITS)
            self.refused -= set(self.in_cut[update.id])
        self.head = decision(update.id, "refused" if refuse else "applied")
        self.commit()

    @precondition(lambda self: self.others < UNITS)
    @rule()
    def another_worker(self) -> None:
        self.weights = self.weights.clone()
        self.weights[UNITS + self.others] += 1
        self.others += 1
        self.commit()

    @rule(back=st.integers(1, 4))
    def fail_over(self, back: int) -> None:
        """A replica that lags takes over: the newest commits never happened."""
        self.history = self.history[: max(1, len(self.history) - back)]
        self.weights, self.head = self.history[-1][0].clone(), self.history[-1][1]
        self.commit()

    @rule(seconds=st.sampled_from([0.0, 1.0, 10.0]), unchanged_known=st.booleans())
    def pull(self, seconds: float, unchanged_known: bool) -> None:
        self.now += seconds
        queue_before, kept_before = list(self.ledger.queue), list(self.ledger.kept)
        same = unchanged_known and torch.equal(self.weights, self.ledger.base)
        change = self.ledger.observe(
            meta_of(self.commits), None if same else self.weights.clone(), self.head, now=self.now
        )
        if change.correction is not None:
            self.local = self.local + change.correction
        assert not change.replace
        if change.lost:
            known = {u.id for u in (*queue_before, *kept_before)}
            self.may_be_lost |= {
                unit for uid, units in self.in_cut.items() if uid not in known for unit in units
            }

    @invariant()
    def books_balance(self) -> None:
        """Local = base + pending + progress, and progress is what was trained since the last cut."""
        expected = torch.zeros(2 * UNITS)
        expected[self.uncut] = 1
        assert torch.equal(self.ledger.progress(self.local), expected)

    @invariant()
    def nothing_twice(self) -> None:
        assert self.local.max() <= 1

    @invariant()
    def chain_is_linked(self) -> None:
        """Every remembered update names the one before it."""
        before = self.ledger.start
        for update in (*self.ledger.kept, *self.ledger.queue):
            assert update.header.prev == before
            before = update.id

    def teardown(self) -> None:
        """At rest (everything sent and decided) every unit is in the expert once, but for refused and lost ones."""
        if not hasattr(self, "ledger"):
            return
        for _ in range(3 * UNITS):
            self.pull(0.0, False)
            if self.ledger.queue:
                self.decide(False)
            elif self.uncut:
                self.cut()
            else:
                break
        for unit in range(self.trained):
            if unit not in self.may_be_lost and unit not in self.refused:
                assert self.weights[unit] == 1, f"unit {unit} is in the expert {self.weights[unit]} times"


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def fresh(numel: int = 4) -> Ledger:
    return Ledger(base=torch.zeros(numel), meta=meta_of(0), run=RUN)


def test_what_quantisation_loses_stays_in_progress() -> None:
    """Error feedback: pending is the decoded update, so the rounding error is progress of the next one."""
    ledger = fresh(64)
    local = torch.linspace(0.1, 1.0, 64)
    update = ledger.make_update(ledger.cut(local, "int8"), Trained(steps=1), fingerprint="f")
    error = local - delta_of(update, 64)
    assert error.abs().max() > 0
    assert torch.equal(ledger.progress(local), error)


def test_refused_update_leaves_local_with_the_weights_and_what_came_after() -> None:
    """The refused part is dropped, progress since stays."""
    ledger = fresh()
    update = ledger.make_update(ledger.cut(torch.ones(4), "fp32"), Trained(steps=1), fingerprint="f")
    local = torch.ones(4) * 3  # two more units trained while it was in flight
    change = ledger.observe(meta_of(1), None, decision(update.id, "refused"), now=0.0)
    assert change.how is not None
    assert change.how.how == "refused"
    assert torch.equal(local + change.correction, torch.full((4,), 2.0))


def test_partly_weighted_update_is_rebased() -> None:
    """After a stale update (factor 1/2) local is the new weights plus progress, not the worker's own sum."""
    ledger = fresh()
    update = ledger.make_update(ledger.cut(torch.ones(4), "fp32"), Trained(steps=1), fingerprint="f")
    weights = torch.full((4,), 0.5) + 7.0
    change = ledger.observe(meta_of(2), weights, decision(update.id), now=0.0)
    assert torch.equal(torch.ones(4) + change.correction, weights)


def test_new_lineage_forgets_everything() -> None:
    """An operator's new lineage replaces local; pending and progress are gone."""
    ledger = fresh()
    update = ledger.make_update(ledger.cut(torch.ones(4), "fp32"), Trained(steps=1), fingerprint="f")
    change = ledger.observe(meta_of(0, "second"), torch.full((4,), 9.0), None, now=0.0)
    assert change.replace
    assert change.dropped == (update.id,)
    assert not ledger.queue
    # The training has not reached a step boundary yet when the next weights come.
    then = ledger.observe(meta_of(1, "second"), torch.full((4,), 11.0), None, now=0.0)
    assert torch.equal(change.correction, torch.full((4,), 9.0))
    assert torch.equal(then.correction, torch.full((4,), 2.0))
    assert ledger.head is None
    assert (
        ledger.make_update(ledger.cut(torch.ones(4), "fp32"), Trained(steps=1), fingerprint="f").header.seq
        == 2
    )


def test_old_checkpoint_adopts_the_later_update_of_its_run() -> None:
    """H5: `decided` names a later update of this run: drop pending and progress, go to its data position."""
    ledger = fresh()
    ledger.make_update(ledger.cut(torch.ones(4), "fp32"), Trained(steps=1), fingerprint="f")
    head = replace(decision(UpdateId(RUN, 5)), position="120")
    change = ledger.observe(meta_of(7), torch.full((4,), 2.0), head, now=0.0)
    assert change.replace
    assert change.position == "120"
    following = ledger.make_update(
        ledger.cut(torch.zeros(4), "fp32"), Trained(steps=1), fingerprint="f"
    ).header
    assert (following.seq, following.prev) == (6, UpdateId(RUN, 5))


def test_another_process_of_the_name_stops_this_one() -> None:
    """H7: `decided` names a later run."""
    with raises(NameTakenError, about="run"):
        fresh().observe(meta_of(1), torch.zeros(4), decision(UpdateId(make_run(4, "0000000a"), 1)), now=0.0)


def test_run_of_the_same_epoch_is_none_of_a_stranger() -> None:
    """H22: Redis forgot the first run of this incarnation, and got it back; this one goes on after it."""
    ledger = fresh()
    ledger.make_update(ledger.cut(torch.ones(4), "fp32"), Trained(steps=1), fingerprint="f")
    head = UpdateId(make_run(3, "ffffffff"), 1)
    change = ledger.observe(meta_of(1), torch.zeros(4), decision(head), now=0.0)
    assert (change.lost, change.replace) == ("", False)
    assert ledger.queue[0].header.prev == head


def test_locate() -> None:
    """Every place a head can have, seen from a chain of two after a start."""
    start, first, second = UpdateId("2-00000002", 9), UpdateId(RUN, 4), UpdateId(RUN, 5)
    known = [first, second]
    assert locate(start, start, known, RUN) == (HeadPlace.KNOWN, 0)
    assert locate(first, start, known, RUN) == (HeadPlace.KNOWN, 1)
    assert locate(second, start, known, RUN) == (HeadPlace.KNOWN, 2)
    assert locate(UpdateId(RUN, 6), start, known, RUN)[0] is HeadPlace.AHEAD
    assert locate(UpdateId(RUN, 3), start, known, RUN)[0] is HeadPlace.BEHIND
    assert locate(UpdateId("1-00000001", 9), start, known, RUN)[0] is HeadPlace.BEHIND
    assert locate(None, start, known, RUN)[0] is HeadPlace.BEHIND
    assert locate(UpdateId("4-00000004", 1), start, known, RUN)[0] is HeadPlace.FOREIGN


def test_kept_updates_are_forgotten_after_their_time_but_the_last() -> None:
    """`keep_decided_s` bounds the kept payloads; one always stays."""
    ledger = replace(fresh(), keep_decided_s=5.0)
    for number in range(3):
        update = ledger.make_update(ledger.cut(torch.zeros(4), "fp32"), Trained(steps=1), fingerprint="f")
        ledger.observe(meta_of(number + 1), torch.zeros(4), decision(update.id), now=10.0 * number)
    assert [u.header.seq for u in ledger.kept] == [3]
    assert ledger.start == UpdateId(RUN, 2)


@pytest.mark.parametrize(
    ("back_to", "lost"),
    [(3, ""), (2, ""), (1, f"after {RUN}:1 up to {RUN}:2"), (0, f"after the beginning up to {RUN}:2")],
)
def test_what_a_deep_rollback_lost_is_named(back_to: int, lost: str) -> None:
    """Three updates decided, the last one kept: what lies between is gone, and the worker knows from where to where."""
    ledger = replace(fresh(), keep_decided_s=5.0)
    for number in range(3):
        update = ledger.make_update(ledger.cut(torch.zeros(4), "fp32"), Trained(steps=1), fingerprint="f")
        ledger.observe(meta_of(number + 1), torch.zeros(4), decision(update.id), now=10.0 * number)
    head = decision(UpdateId(RUN, back_to)) if back_to else None
    change = ledger.observe(meta_of(back_to), torch.zeros(4), head, now=99.0)
    assert change.lost == lost
    assert [update.header.seq for update in ledger.queue] == ([] if back_to == 3 else [3])


@pytest.mark.parametrize("rolled_back", [False, True])
def test_an_error_half_way_leaves_the_books_as_they_were(rolled_back: bool) -> None:
    """A part that cannot be decoded, out of a damaged file: the next look sees the same base and queue.

    In an advance, or a rollback that sends a decided update again.
    """
    ledger = fresh()
    update = ledger.make_update(ledger.cut(torch.ones(4), "fp32"), Trained(steps=1), fingerprint="f")
    damaged = replace(update, parts=(b"garbage",))
    head: Decided | None = decision(update.id)
    if rolled_back:
        ledger.start, ledger.queue, ledger.kept, head = UpdateId(RUN, 9), [], [damaged], None
    else:
        ledger.queue[0] = damaged
    before = (ledger.base.clone(), ledger.meta, ledger.start, list(ledger.queue), list(ledger.kept))
    for _ in range(2):
        with pytest.raises(UpdateError):
            ledger.observe(meta_of(1), torch.full((4,), 5.0), head, now=0.0)
        assert torch.equal(ledger.base, before[0])
        assert (ledger.meta, ledger.start, ledger.queue, ledger.kept) == before[1:]
    if not rolled_back:
        ledger.queue[0] = update
        change = ledger.observe(meta_of(1), torch.full((4,), 5.0), head, now=0.0)
        assert torch.equal(torch.ones(4) + change.correction, torch.full((4,), 5.0))


@pytest.mark.parametrize(
    ("base", "how", "made", "dropped"),
    [
        (3, "", 0, True),  # its base was rolled back
        (2, "", 0, False),  # it is of the version that was gone back to
        (2, "applied", 4, True),  # its own update was rolled back, and it trained on
        (2, "applied", 6, False),  # its own update is of after the rollback
        (2, "refused", 4, False),  # its own update was never part of the weights
    ],
)
def test_what_was_trained_on_what_an_operator_took_back_is_dropped(
    base: int, how: str, made: int, dropped: bool
) -> None:
    """Versions 3 and 4 were rolled back to version 2; what is in flight is decided by the aggregator."""
    ledger = Ledger(base=torch.zeros(4), meta=meta_of(base), run=RUN)
    update = ledger.make_update(ledger.cut(torch.ones(4), "fp32"), Trained(steps=1), fingerprint="f")
    local = torch.ones(4) * 3  # two more units trained while it was in flight
    meta = replace(meta_of(6), rolled_back=RolledBack().and_also(2, 4))
    weights = torch.full((4,), 8.0)
    decided = replace(decision(update.id, how), version=made) if how else None
    change = ledger.observe(meta, weights, decided, now=0.0)
    assert (change.replace, change.rolled_back) == (dropped, dropped)
    local = change.correction.clone() if change.replace else local + change.correction
    in_flight = 0.0 if how else 1.0
    assert torch.equal(local, torch.full((4,), 8.0 + in_flight + (0.0 if dropped else 2.0)))
    assert torch.equal(ledger.progress(local), torch.full((4,), 0.0 if dropped else 2.0))
    assert not ledger.observe(meta, None, decided, now=1.0).rolled_back


def test_loss_of_a_version_that_a_failover_took_is_not_sent() -> None:
    """The update is sent again without it, as it was made once the expert has that version again."""
    ledger = Ledger(base=torch.zeros(4), meta=meta_of(7), run=RUN)
    measured = Measured(loss=1.5, version=7, rows=9, rows_set="rows")
    cut = ledger.cut(torch.ones(4), "fp32")
    made = ledger.make_update(cut, Trained(steps=1), fingerprint="f", measured=measured)
    assert ledger.to_send()[0] == made.header
    ledger.observe(meta_of(5), torch.zeros(4), None, now=0.0)
    assert ledger.to_send()[0] == made.header.unmeasured()
    assert made.header.unmeasured().val_loss is None
    ledger.observe(meta_of(8), torch.zeros(4), None, now=0.0)
    assert ledger.to_send()[0] == made.header
