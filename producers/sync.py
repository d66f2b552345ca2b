"""Publish, poll and pull, beside the training.

At most one update is in flight. While it is undecided (aggregator down, Redis down, Redis full), training goes on
and its progress accumulates into the next one. Every turn of the loop is one small step whose repetition is
harmless, so whatever fails is simply tried again.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch

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
from fedmoe.protocol.records import Meta
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import UpdateId
from fedmoe.store.worker import Poll, WorkerStore
from fedmoe.util.backoff import Backoff
from producers.checkpoint import Checkpoint, StateDir
from producers.exchange import Exchange, TrainingState
from producers.heartbeat import Fields, Heartbeat, SyncStatus
from producers.ledger import Change, Ledger, Trained
from producers.news import change_of_rules, told
from producers.pace import Pace
from producers.pull import pull
from producers.saver import RETRY_S, Saver
from producers.watch import LOOK_S, AggregatorWatch

logger = logging.getLogger(__name__)

AT_THE_END_S = (
    5.0  # of the drain (but at most half of it), in which the end of a step is not waited for any more
)
LOOK_FOR_RULES_S = 10.0
NO_ENTRY = "0-1"  # an id that no entry has


class Sync:
    """The sync thread of one worker.

    Args:
        store: of this thread alone.
        identity: of the base model here, for the heartbeat and to compare with what the expert has pinned.
        ledger, exchange: the books, and the meeting point with the training.
        state_dir: where to write a checkpoint before each publication, or None.
        data: digest of the examples.
        training_fields: the training's part of the heartbeat.
        max_length: that the examples were truncated to (tokens); None: that of the ledger's rules.
        must_pull: look at Redis before the first update (a resumed worker).
        checkpoint_interval_s: write a checkpoint after so long without a new update, whose checkpoint comes first.
    """

    def __init__(
        self,
        store: WorkerStore,
        ledger: Ledger,
        exchange: Exchange,
        spec: Spec,
        *,
        identity: BaseIdentity,
        state_dir: StateDir | None,
        data: str,
        training_fields: Callable[[], Fields] = dict,
        max_length: int | None = None,
        must_pull: bool = False,
        checkpoint_interval_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.status = SyncStatus(version=ledger.meta.version)
        self.failure: FedMoEError | None = None
        self.saved = False  # all that is not decided is in the last checkpoint
        self.is_saving = False
        self.ledger = ledger
        self._store = store
        if ledger.queue:  # a resumed worker does not know how far it had got
            store.announced = ledger.queue[0].id
        self._exchange = exchange
        self._spec = spec
        self._identity = identity
        self._state_dir = state_dir
        self._saver = Saver(state_dir, clock) if state_dir else None
        self._watch = AggregatorWatch(store, clock)
        self._data = data
        state_id = state_dir.id if state_dir else ""
        self._heart = Heartbeat(
            store, identity, state_id=state_id, training_fields=training_fields, clock=clock
        )
        self._max_length = max_length or ledger.meta.rules.training.max_length
        self._must_pull = must_pull
        self._clock = clock
        self._wake = threading.Event()
        self._deadline: float | None = None
        self._hurry_at = math.inf
        self._problems: dict[str, str] = {}
        self._ended = False
        self._checkpoint_interval_s = checkpoint_interval_s
        self._next_update_at = clock() + ledger.meta.rules.sync_interval_s
        self._next_save = clock() + checkpoint_interval_s
        self._next_look = clock() + LOOK_FOR_RULES_S
        self._waiting_for_state = self._checkpointing = False
        self._unsaved: TrainingState | None = None
        self._entry: str | None = None
        self._sent: UpdateId | None = None
        self._pace = Pace(clock)

    @property
    def in_redis(self) -> bool:
        """True if every undecided update was published, so that it waits in Redis."""
        return len(self.ledger.queue) == 1 and self._entry is not None

    def finish(self, timeout_s: float) -> None:
        """Publish what is trained, wait at most timeout_s for the decision, and end; the first call counts."""
        if self._deadline is None:
            self._hurry_at = self._clock() + max(timeout_s / 2, timeout_s - AT_THE_END_S)
            self._deadline = self._clock() + timeout_s
        self._wake.set()

    @property
    def _is_late(self) -> bool:
        """True when the time that `finish` gave is up."""
        return self._deadline is not None and self._clock() >= self._deadline

    def run(self) -> None:
        """The thread's body; ends after `finish`, or with `failure` set."""
        self._serve()
        # With another FedMoE the same worker can go on.
        can_go_on = self.failure is None or isinstance(self.failure, ProtocolError)
        if self._state_dir and not self._ended and can_go_on:
            self._save_last()

    def _save_last(self) -> None:
        """The time is up and an update is undecided: keep it, and all that was trained since, on disk."""
        self._hurry_at = min(self._hurry_at, self._clock())
        state = self._copy(consume=False)
        assert state is not None  # it is too late to wait for the end of a step
        self.saved = self._save(state)

    def _serve(self) -> None:
        backoff = Backoff("sync", logger, self._clock)
        while not self._ended:
            try:
                wait_s = self._turn()
                if not self._waiting_for_state and not self._heart.is_refused:
                    backoff.ok()
                    self._note("sync", "")
            except (NameTakenError, RefusedError, ProtocolError) as error:
                self.failure = error
                return
            except UnknownExpertError as error:
                self._entry = None  # it is gone, too
                self._heart.hasten()  # whoever would create it again shall see that somebody knows it
                wait_s = self._failed(backoff, error)
            except (RedisUnavailableError, SpecError) as error:
                wait_s = self._failed(backoff, error)
            except Exception as error:
                logger.exception("sync: unexpected error")
                wait_s = self._failed(backoff, error)
            if self._is_late:
                return
            self._wake.wait(wait_s)
            if self._deadline is None:
                self._wake.clear()
            elif wait_s > 0:
                time.sleep(min(wait_s, 0.05))

    def _failed(self, backoff: Backoff, error: Exception) -> float:
        self._note("sync", str(error))
        return 0.0 if self._is_late else backoff.failed(error)

    def _note(self, source: str, problem: str) -> None:
        """Note what is wrong with one thing that the worker needs; "" means: it is well (again)."""
        if self._problems.get(source, "") == problem:
            return
        self._problems[source] = problem
        self.status = replace(self.status, problem="; ".join(filter(None, self._problems.values())))
        if source != "sync":  # that is Redis' problem: it takes no heartbeat now
            self._heart.hasten()

    def _turn(self) -> float:
        """One step; returns the seconds to wait before the next. What needs no Redis comes first."""
        now = self._clock()
        due = self._deadline is not None or now >= self._next_update_at
        if self._unsaved is not None:
            reached = self._save_unsaved()
        elif due and not self.ledger.queue and not self._must_pull and not self._checkpointing:
            reached = self._make_update(now)
        else:
            reached = not self._state_dir or now < self._next_save or self._checkpoint(now)
        self._beat()
        self._note("aggregator", self._watch.look())
        if not reached:
            return 0.0
        if self._must_pull:
            self._pull()
            self._must_pull = False
        if self._unsaved is not None:
            return RETRY_S if self._problems.get("disk") else 0.0
        if self.ledger.queue:
            return self._follow()
        self._look_for_rules(now)
        return min(self._next_update_at - now, LOOK_S) if self._deadline is None else 0.0

    def _copy(self, *, consume: bool) -> TrainingState | None:
        """A copy of the training's state, or None if it has not reached a step boundary yet: come back."""
        if not self._waiting_for_state:
            self._exchange.request(consume=consume)
            self._waiting_for_state = True
        state = self._exchange.take(0.2)
        if state is None and self._clock() >= self._hurry_at:
            state = self._exchange.take_now()
        self._waiting_for_state = state is None
        return state

    def _make_update(self, now: float) -> bool:
        """Make the training's progress the next update; False if it has not reached a boundary yet."""
        state = self._copy(consume=True)
        if state is None:
            return False
        self._next_update_at = now + self.ledger.meta.rules.sync_interval_s
        self._next_save = now + self._checkpoint_interval_s
        if state.trained.steps:
            progress = self.ledger.progress(state.local)
            if self._diverged(progress, state.trained.steps):
                return True
            update = self.ledger.make_update(
                progress, state.trained, wire_format=self._spec.wire_format,
                fingerprint=self._identity.fingerprint, tokenizer=self._identity.tokenizer,
            )  # fmt: skip
            self.status = replace(self.status, in_flight=update.header.seq, in_flight_since=now)
            self._unsaved = replace(state, trained=Trained()) if self._state_dir else None
        elif self._deadline is None:
            self._pull()  # nothing was trained on the old base, so a newer one costs nothing
        else:
            if self._state_dir:
                self._save(state)  # if the disk does not take it, nothing is lost: all is decided
            self._ended = True
        return True

    def _save_unsaved(self) -> bool:
        """Write the checkpoint that the update in the queue waits for: it is published after that, never before."""
        assert self._saver is not None
        assert self._unsaved is not None
        if self._saver.is_due and self._save(self._unsaved):
            self._unsaved = None
        return True

    def _diverged(self, progress: torch.Tensor, steps: int) -> bool:
        """True if the progress could only be refused; then it is dropped, and training goes on from the expert.

        It must not be published: taken off again after the refusal, numbers that large leave nothing of the rest.
        """
        norm, bound = float(torch.linalg.vector_norm(progress)), self.ledger.meta.rules.aggregation.max_norm
        if norm <= bound:
            return False
        logger.warning(
            "the training diverged: %d steps changed the adapter by a norm of %.3g, the bound is %.4g; they are "
            "dropped, going on from the expert's weights (is the learning rate too high?)",
            steps, norm, bound,
        )  # fmt: skip
        self._exchange.correct(Change(correction=self.ledger.base + self.ledger.pending(), replace=True))
        return True

    def _checkpoint(self, now: float) -> bool:
        """Save the training between two updates, so that a long outage costs a killed worker little."""
        state = self._copy(consume=False)
        self._checkpointing = state is None  # what was asked for is this one's, not the next update's
        if state is not None:
            self._next_save = now + (self._checkpoint_interval_s if self._save(state) else RETRY_S)
        return state is not None

    def _save(self, state: TrainingState) -> bool:
        """Write a checkpoint; False if the disk does not take it. The worker lives on and says so."""
        assert self._saver is not None
        checkpoint = Checkpoint(
            ledger=self.ledger,
            local=state.local,
            optimizer=state.optimizer,
            trained=state.trained,
            position=state.position,
            data=self._data,
            expert=self._store.expert,
            worker=self._store.worker,
        )
        self.is_saving = True
        try:
            saved = self._saver.save(checkpoint, meanwhile=self._live_on)
        finally:
            self.is_saving = False
        self._note("disk", self._saver.problem)
        return saved

    def _live_on(self) -> None:
        """While the disk takes its time."""
        assert self._saver is not None
        self._note("disk", self._saver.problem)
        with suppress(FedMoEError):
            self._beat()

    def _follow(self) -> float:
        """Publish the first update of the queue, or see what became of it."""
        update = self.ledger.queue[0]
        if self._entry is None:
            if rest_s := self._pace.rest_s():
                return rest_s
            # Sent before, and then lost sight of: a decision may have taken its payload away meanwhile.
            if self._sent == update.id and self._moved(poll := self._store.poll(NO_ENTRY, update.header)):
                self._pull(poll.weights_commit)
                return 0.0
            self._sent = update.id
            self._entry = self._store.publish(*self.ledger.to_send())
            self.status = replace(self.status, published=self.status.published + 1)
            return self._pace.sent()
        poll = self._store.poll(self._entry, update.header)
        if self._moved(poll):
            self._pace.decided()
            self._pull(poll.weights_commit)
            return 0.0
        if not poll.entry_waits:
            logger.info("update %s is gone without a decision; sending it again", update.id)
            self._entry = None
            self.status = replace(self.status, undecided=self.status.undecided + 1)
            self._pace.gone()
            return self._pace.rest_s()
        return self._pace.undecided()

    def _moved(self, poll: Poll) -> bool:
        """True if Redis knows another head or lineage than the books, or went back."""
        head, meta = poll.decided.id if poll.decided else None, self.ledger.meta
        return head != self.ledger.head or poll.lineage != meta.lineage or poll.version < meta.version

    def _pull(self, seen: str = "") -> None:
        """Read the expert and one's own decision, settle the books, hand the correction to the training.

        `seen` is the weights' commit that a poll has just shown, "" if nobody has looked.
        """
        mine, rules = self.ledger.meta.weights_commit, self.ledger.meta.rules
        pulled = pull(self._store, self._spec, known=mine if seen in ("", mine) else "")
        self._check_still_welcome(pulled.meta)
        change = self.ledger.observe(
            pulled.meta, pulled.weights, pulled.decided, now=self._clock(), packed=pulled.packed
        )
        steps = self._exchange.steps_left
        self._exchange.correct(change)
        self._entry = None  # of another update, or of a history that is no longer so
        self._pace.moved_on()
        self.status = told(self.status, change, self.ledger, steps)
        self._follow_rules(rules)

    def _check_still_welcome(self, meta: Meta) -> None:
        """Raise RefusedError if every further update would be refused."""
        if meta.spec != self._spec.digest:
            raise RefusedError(
                f"expert {self._store.expert!r} was created again with another spec: restart this worker"
            )
        if refusal := self._identity.refusal(meta, self._store.expert):
            raise RefusedError(refusal)

    def _look_for_rules(self, now: float) -> None:
        """Pull if an operator has changed the rules: with a long sync interval, the next pull is far away."""
        if self._deadline is None and now >= self._next_look:
            self._next_look = now + LOOK_FOR_RULES_S
            if self._store.rules() not in (None, self.ledger.meta.rules):
                self._pull()

    def _follow_rules(self, before: RuleSet) -> None:
        """Take over what an operator has changed since the last pull, and say so."""
        rules = self.ledger.meta.rules
        if rules == before:
            return
        self._next_update_at = min(self._next_update_at, self._clock() + rules.sync_interval_s)
        self._exchange.adopt(rules.training)
        logger.info("%s", change_of_rules(before, rules, self._max_length))

    def _beat(self) -> None:
        self._heart.beat(self.ledger, self.status)
