"""Publish, poll and pull, beside the training.

At most one update is in flight. While it is undecided (aggregator down, Redis down, Redis full), training goes on
and its progress accumulates into the next one. Every turn of the loop is one small step whose repetition is
harmless, so whatever fails is simply tried again.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from fedmoe.errors import (
    FedMoEError,
    NameTakenError,
    ProtocolError,
    RedisUnavailableError,
    RefusedError,
    SpecError,
    UnknownExpertError,
)
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import UpdateId
from fedmoe.store.presence import Seen
from fedmoe.store.worker import Poll, WorkerStore
from fedmoe.util.backoff import Backoff
from producers.checkpoint import Checkpoint
from producers.exchange import Exchange, TrainingState
from producers.heartbeat import SyncStatus
from producers.ledger import Change, Ledger, Trained
from producers.news import Fixed, change_of_rules, check_still_welcome, status_after, tell_diverged, tell_drop
from producers.outbox import Outbox, Prepare, Talk
from producers.pace import Pace, Timetable
from producers.ports import Heart, Saves, Watch
from producers.pull import pull
from producers.saver import RETRY_S
from producers.watch import LOOK_S

logger = logging.getLogger(__name__)

NO_ENTRY = "0-1"  # an id that no entry has


class Sync:
    """The sync thread of one worker. Built by `producers.membership`.

    Args:
        store: used by this thread only.
        ledger, exchange: the worker's books, and where it meets the training.
        identity: of the base model here; compared with what the expert has pinned.
        data: digest of the examples.
        heart: writes the heartbeat. watch: looks for an aggregator.
        saver: writes checkpoints, one before each publication; None without a state directory.
        outbox: progress of the first undecided update.
        fixed: rules that are followed from the next start on; None: only `max_length`, as the ledger's rules say.
        checkpoint_interval_s: seconds without a new update after which a checkpoint is written all the same.
        drops_diverged: drop progress whose norm exceeds the bound, instead of publishing it.

    Attributes:
        unsaved: the training's state for the checkpoint that must precede the first update; None if it is on disk.
        failure: the error that retries cannot mend; None while there is none.
        saved: the last checkpoint holds every undecided update and all progress.
        has_ended: the sync was told to end, and everything that was trained is decided.
    """

    def __init__(
        self,
        store: WorkerStore,
        ledger: Ledger,
        exchange: Exchange,
        spec: Spec,
        *,
        identity: BaseIdentity,
        data: str,
        heart: Heart,
        watch: Watch,
        saver: Saves | None = None,
        outbox: Outbox | None = None,
        fixed: Fixed | None = None,
        checkpoint_interval_s: float = 60.0,
        drops_diverged: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.status = SyncStatus(version=ledger.meta.version)
        self.failure: FedMoEError | None = None
        self.saved = self.is_saving = self.has_ended = False
        self.ledger = ledger
        self.unsaved: TrainingState | None = None
        self.outbox = outbox or Outbox()
        self.pace = Pace(clock)
        self.times = Timetable(
            update_at=clock() + ledger.meta.rules.sync_interval_s,
            save_at=clock() + checkpoint_interval_s,
        )
        self._store = store
        if ledger.queue:  # a resumed worker does not know how far it had got
            store.announced = ledger.queue[0].id
        self._exchange = exchange
        self._spec = spec
        self._identity = identity
        self._saver = saver
        self._data = data
        self._heart, self.watch = heart, watch
        self._fixed = fixed or Fixed(max_length=ledger.meta.rules.training.max_length)
        self._clock = clock
        self._wake = threading.Event()
        self._backoff = Backoff("sync", logger, clock)
        self._problems: dict[str, str] = {}
        self._checkpoint_interval_s = checkpoint_interval_s
        self._drops_diverged = drops_diverged
        self._waiting_for_state = False
        self._seen: Seen | None = None  # the last heartbeat's, in which it looked for new rules

    @property
    def in_redis(self) -> bool:
        """True if every undecided update was published, so that it waits in Redis."""
        return len(self.ledger.queue) == 1 and self.outbox.entry is not None

    def finish(self, timeout_s: float) -> None:
        """Publish the progress, wait at most timeout_s for the decision, and end; only the first call counts."""
        self.times.end_within(timeout_s, self._clock())
        self._wake.set()

    def run(self) -> None:
        """The body of the thread; ends after `finish`, or once `failure` is set."""
        while not self.has_ended:
            wait_s = self.attempt()
            if self.failure or self._clock() >= self.times.end_at:
                break
            self._wake.wait(wait_s)
            if not self.times.is_ending:
                self._wake.clear()
            elif wait_s > 0:
                time.sleep(min(wait_s, 0.05))
        # After an upgrade the same worker can resume.
        can_go_on = self.failure is None or isinstance(self.failure, ProtocolError)
        if self._saver and not self.has_ended and can_go_on:
            self._save_last()

    def _save_last(self) -> None:
        """Write a last checkpoint: the time is up, and an update is undecided."""
        self.times.hurry_at = min(self.times.hurry_at, self._clock())
        state = self._copy(consume=False)
        assert state is not None  # it is too late to wait for the end of a step
        self.saved = self._save(state)

    def attempt(self) -> float:
        """One turn. An error is noted and the next turn retries; returns the seconds to wait before it.

        An error that retries cannot mend becomes `failure`.
        """
        try:
            wait_s = self._turn()
            if not self._waiting_for_state and not self._heart.is_refused:
                self._backoff.ok()
                self._note("sync", "")
        except (NameTakenError, RefusedError, ProtocolError) as error:
            self.failure = error
            return 0.0
        except UnknownExpertError as error:
            self.outbox = self.outbox.lost_sight()  # the entry is gone, too
            self._heart.hasten()  # whoever would create it again shall see that somebody knows it
            return self._failed(error)
        except Exception as error:
            if not isinstance(error, RedisUnavailableError | SpecError):
                logger.exception("sync: unexpected error")
            return self._failed(error)
        return wait_s

    def _failed(self, error: Exception) -> float:
        self._note("sync", str(error))
        return 0.0 if self._clock() >= self.times.end_at else self._backoff.failed(error)

    def _note(self, source: str, problem: str) -> None:
        """Note what is wrong with a source (sync, aggregator, disk); "" if nothing is."""
        if self._problems.get(source, "") == problem:
            return
        self._problems[source] = problem
        self.status = replace(self.status, problem="; ".join(filter(None, self._problems.values())))
        if source != "sync":  # that is Redis' problem: it takes no heartbeat now
            self._heart.hasten()

    def _turn(self) -> float:
        """One turn; returns the seconds to wait before the next. Actions without Redis come first."""
        now = self._clock()
        reached = self._prepare(now)
        self._heart.beat(self.ledger, self.status)
        self._note("aggregator", self.watch.look())
        return self._talk(now) if reached else 0.0

    @property
    def _first(self) -> UpdateId | None:
        """The first undecided update."""
        return self.ledger.queue[0].id if self.ledger.queue else None

    def _prepare(self, now: float) -> bool:
        """Perform the next action with training and disk; False if it must wait for a step boundary."""
        times = self.times
        todo = self.outbox.prepare(
            self._first,
            is_due=times.is_ending or now >= times.update_at,
            must_checkpoint=self._saver is not None and now >= times.save_at,
        )
        match todo:
            case Prepare.SAVE:
                self._save_unsaved()
            case Prepare.MAKE:
                return self._make_update(now)
            case Prepare.CHECKPOINT:
                return self._checkpoint(now)
        return True

    def _talk(self, now: float) -> float:
        """Perform the next action with Redis; returns the seconds to wait after it."""
        if self.outbox.talk(self._first) is Talk.PULL:
            self._pull()
        match todo := self.outbox.talk(self._first):
            case Talk.HOLD:
                return RETRY_S if self._problems.get("disk") else 0.0
            case Talk.LOOK | Talk.ANNOUNCE:
                return self._announce(look=todo is Talk.LOOK)
            case Talk.POLL:
                return self._poll()
        self._look_for_rules()
        return 0.0 if self.times.is_ending else min(self.times.update_at - now, LOOK_S)

    def _copy(self, *, consume: bool) -> TrainingState | None:
        """A copy of the training's state; None if the training has not reached a step boundary yet."""
        if not self._waiting_for_state:
            self._exchange.request(consume=consume)
            self._waiting_for_state = True
        state = self._exchange.take(0.2)
        if state is None and self._clock() >= self.times.hurry_at:
            state = self._exchange.take_now()
        self._waiting_for_state = state is None
        return state

    def _make_update(self, now: float) -> bool:
        """Turn the training's progress into the next update; False if it has not reached a boundary yet."""
        state = self._copy(consume=True)
        if state is None:
            return False
        self.times.update_at = now + self.ledger.meta.rules.sync_interval_s
        self.times.save_at = now + self._checkpoint_interval_s
        if state.trained.steps:
            cut = self.ledger.cut(state.local, self._spec.wire_format)
            if self._diverged(cut.norm, state.trained.steps):
                return True
            update = self.ledger.make_update(
                cut, state.trained, fingerprint=self._identity.fingerprint,
                tokenizer=self._identity.tokenizer, measured=self._exchange.take_measured(),
            )  # fmt: skip
            self.status = replace(self.status, in_flight=update.header.seq, in_flight_since=now)
            self.outbox = self.outbox.made(must_save=self._saver is not None)
            if self._saver:
                self.unsaved = replace(state, trained=Trained())
            else:
                self._exchange.give_back(state)
        elif not self.times.is_ending:
            self._exchange.give_back(state)
            self._pull()  # nothing was trained on the old base, so a newer one costs nothing
        else:
            if self._saver:
                self._save(state)  # if the disk does not take it, nothing is lost: all is decided
            self.has_ended = True
        return True

    def _save_unsaved(self) -> None:
        """Write the checkpoint that the update in the queue waits for: it is published after that, never before."""
        assert self._saver is not None
        assert self.unsaved is not None
        if self._saver.is_due and self._save(self.unsaved):
            self._exchange.give_back(self.unsaved)
            self.outbox, self.unsaved = self.outbox.saved(), None

    def _diverged(self, norm: float, steps: int) -> bool:
        """True if the progress could only be refused; then it is dropped, and training goes on from the expert.

        It must not be published: taken off again after the refusal, numbers that large leave nothing of the rest.
        """
        bound = self.ledger.meta.rules.aggregation.max_norm
        if not self._drops_diverged or norm <= bound:
            return False
        change = Change(correction=self.ledger.base + self.ledger.pending(), replace=True)
        self._exchange.correct(change, tell_diverged(norm, steps, bound, self._store.expert))
        return True

    def _checkpoint(self, now: float) -> bool:
        """Save the training between two updates, so that a long outage costs a killed worker little."""
        state = self._copy(consume=False)
        # What was asked for is this one's, not the next update's.
        self.outbox = replace(self.outbox, checkpointing=state is None)
        if state is not None:
            self.times.save_at = now + (self._checkpoint_interval_s if self._save(state) else RETRY_S)
            self._exchange.give_back(state)
        return state is not None

    def _save(self, state: TrainingState) -> bool:
        """Write a checkpoint; False if the disk refuses it, which the worker reports while it goes on."""
        assert self._saver is not None
        checkpoint = Checkpoint(
            ledger=self.ledger, local=state.local, optimizer=state.optimizer, trained=state.trained,
            position=state.position, data=self._data, expert=self._store.expert, worker=self._store.worker,
        )  # fmt: skip
        self.is_saving = True
        try:
            saved = self._saver.save(checkpoint, meanwhile=self._live_on)
        finally:
            self.is_saving = False
        self._note("disk", self._saver.problem)
        return saved

    def _live_on(self) -> None:
        """Keep the heartbeat going while the disk is slow."""
        assert self._saver is not None
        self._note("disk", self._saver.problem)
        with suppress(FedMoEError):
            self._heart.beat(self.ledger, self.status)

    def _announce(self, *, look: bool) -> float:
        """Publish the first update of the queue; with `look`, check first that it was not decided meanwhile."""
        update = self.ledger.queue[0]
        if rest_s := self.pace.rest_s():
            return rest_s
        if look and self._moved(poll := self._store.poll(NO_ENTRY, update.header)):
            self._pull(poll.weights_commit)
            return 0.0
        self.outbox = self.outbox.announcing(update.id)
        self.outbox = self.outbox.announced(self._store.publish(*self.ledger.to_send()))
        self.status = replace(self.status, published=self.status.published + 1)
        return self.pace.sent()

    def _poll(self) -> float:
        """Poll for the decision of the first update."""
        update = self.ledger.queue[0]
        assert self.outbox.entry is not None
        poll = self._store.poll(self.outbox.entry, update.header)
        if self._moved(poll):
            self.pace.decided()
            self._pull(poll.weights_commit)
            return 0.0
        if poll.entry_waits:
            entry, known = self.outbox.entry, (self.ledger.head, self.ledger.meta.lineage)
            if self._look_for_rules(waits=True) and (self.ledger.head, self.ledger.meta.lineage) == known:
                self.outbox = self.outbox.announced(entry)
            return self.pace.undecided()
        logger.info("update %s is gone without a decision; sending it again", update.id)
        self.outbox = self.outbox.lost_sight()
        self.status = replace(self.status, undecided=self.status.undecided + 1)
        self.pace.gone()
        return self.pace.rest_s()

    def _moved(self, poll: Poll) -> bool:
        """True if Redis holds another head or lineage than the ledger, or an older version."""
        head, meta = poll.decided.id if poll.decided else None, self.ledger.meta
        return head != self.ledger.head or poll.lineage != meta.lineage or poll.version < meta.version

    def _pull(self, seen: str = "") -> None:
        """Read the expert and the worker's own decision, settle the ledger, hand the correction to the training.

        `seen` is the weights' commit that a poll has just shown, "" if nobody has looked.
        """
        mine, rules = self.ledger.meta.weights_commit, self.ledger.meta.rules
        pulled = pull(
            self._store, self._spec, known=mine if seen in ("", mine) else "", spares=self.ledger.spares
        )
        check_still_welcome(pulled.meta, self._spec, self._identity, self._store.expert)
        change = self.ledger.observe(
            pulled.meta, pulled.weights, pulled.decided, now=self._clock(), packed=pulled.packed
        )
        self._exchange.offer_base(pulled.meta, pulled.weights)
        tell = tell_drop(change, self.ledger, self._store.expert) if change.replace else None
        self._exchange.correct(change, tell)
        self.outbox = self.outbox.pulled()
        self.pace.moved_on()
        self.status = status_after(self.status, change, self.ledger)
        self._follow_rules(rules)

    def _look_for_rules(self, *, waits: bool = False) -> bool:
        """Pull if a heartbeat found new rules or a rollback; a rollback has to wait while an update `waits`."""
        if self.times.is_ending or (seen := self._store.seen) is None or seen is self._seen:
            return False
        self._seen, known = seen, (self.ledger.meta.rules, self.ledger.meta.rolled_back)
        # What waits stands on what is rolled back, and so would all that is trained until it is refused.
        if differs := seen.orders not in (None, known) and not (waits and seen.orders[1] != known[1]):
            self._pull()
        return differs

    def _follow_rules(self, before: RuleSet) -> None:
        """Adopt the rules that an operator changed since the last pull, and log them."""
        rules = self.ledger.meta.rules
        if rules == before:
            return
        self.times.update_at = min(self.times.update_at, self._clock() + rules.sync_interval_s)
        self._exchange.adopt(rules.training)
        logger.info("%s", change_of_rules(before, rules, self._fixed))
