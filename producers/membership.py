"""One worker of one expert, from joining to leaving. `fedmoe worker run` and `fedmoe.join` are built on it.

    with Membership(redis, "sql_expert", "alice", state_dir=…) as member:
        spec, meta = member.look()           # what the expert is
        member.claim(identity)               # take the name, with this base model
        member.begin(trainer, data=…)        # resume, or pull the expert into the trainer
        while …:
            member.exchange.boundary()       # add corrections, hand out a copy
            member.exchange.record(trainer.step())
        print(member.finish(drain_s))

Every call up to `begin` waits for Redis. After it, only `finish` waits.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import torch

from fedmoe.errors import (
    FedMoEError,
    NameTakenError,
    ProtocolError,
    RedisUnavailableError,
    RefusedError,
    SettingsError,
    StoppedError,
)
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.records import Meta
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import make_run
from fedmoe.protocol.vectors import DomainVector
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.worker import WorkerStore
from fedmoe.util.log import SYNC
from fedmoe.util.stopping import without_interrupt
from fedmoe.util.text import counted
from producers.checkpoint import StateDir
from producers.claim import claim_name
from producers.exchange import Exchange, Trains
from producers.heartbeat import HEARTBEAT_INTERVAL_S, Fields, Heartbeat
from producers.join import Joining
from producers.ledger import Ledger, Trained
from producers.news import Fixed
from producers.outbox import Outbox
from producers.pull import pull
from producers.saver import Saver
from producers.sync import Sync
from producers.watch import AggregatorWatch

logger = logging.getLogger(__name__)


class Resumes(Trains, Protocol):
    """A trainer that can resume from a checkpoint."""

    def load_state(self, state: Mapping[str, torch.Tensor], *, same_data: bool) -> None:
        """Restore what `state` returned in an earlier process; without `same_data`, not what belongs to the data."""
        ...


class Membership:
    """One worker of one expert. A context manager: its end removes the heartbeat and records how the worker ended.

    Args:
        expert, worker: their names; a worker's name is unique on its expert.
        state_dir: directory for checkpoints, from which the next process resumes; closed at the end. None: undecided
            updates are lost with the process.
        wait: retry while Redis cannot be reached or has no experts at all, instead of failing.
        stop: ends the retries.
        checkpoint_interval_s: longest time between two checkpoints.
        report: called with each line for people.

    Attributes:
        spec, meta: of the expert, as `look` found them; None before.
        identity: of the base model here; None before `claim`.
        exchange, sync, thread: set by `begin`.
        is_done: the training has reached its own end; `fedmoe status` then shows the worker as finished.
        failure, elsewhere: how it failed, None if it did not; errors of this worker's other memberships.
    """

    exchange: Exchange
    sync: Sync
    thread: threading.Thread

    def __init__(
        self,
        redis: RedisSettings,
        expert: str,
        worker: str,
        *,
        state_dir: StateDir | None = None,
        wait: bool = True,
        stop: threading.Event | None = None,
        checkpoint_interval_s: float = 60.0,
        report: Callable[[str], None] = logger.info,
    ) -> None:
        self.store = WorkerStore(Connection(redis), expert, worker)
        self.is_done = False
        self._stop = stop or threading.Event()
        self._joining = Joining(self.store, wait=wait, stop=self._stop)
        self._state_dir = state_dir
        self._checkpoint_interval_s = checkpoint_interval_s
        self._report = report
        self.spec: Spec | None = None
        self.meta: Meta | None = None
        self.identity: BaseIdentity | None = None
        self.failure: FedMoEError | None = None
        self.elsewhere: tuple[FedMoEError, ...] = ()
        self._has_joined = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the heartbeat and record how the worker ended, for `fedmoe status`."""
        if error in self.elsewhere:
            error = self.failure
        if self._has_joined and not isinstance(error, NameTakenError):  # else the heartbeat is another's
            how, reason = "finished" if self.is_done else "stopped", ""
            if error is not None and not isinstance(error, StoppedError):
                how = "refused" if isinstance(error, RefusedError) else "failed"
                reason = str(error) or repr(error)
            try:
                self.store.leave(how, reason)
            except RedisUnavailableError:
                logger.debug("the heartbeat could not be removed; it expires by itself")
        if self._state_dir:
            self._state_dir.close()

    def look(self) -> tuple[Spec, Meta]:
        """Check the rights of this Redis user, then read the expert's spec and meta.

        Raises:
            RedisUnfitError: if rights of a worker are missing; names all of them.
            UnknownExpertError: if there is no such expert; names those there are.
            ProtocolError: if releases do not fit; names the side to upgrade.
        """
        self._joining.check_rights()
        self.spec = self._joining.spec()
        self.meta = self._joining.meta()
        return self.spec, self.meta

    def claim(self, identity: BaseIdentity) -> None:
        """Take the name, with this base model.

        Raises:
            BaseModelError: if the expert's base model is another one.
            NameTakenError: if a worker of this name runs already.
        """
        self.identity = identity
        state_id = self._state_dir.id if self._state_dir else ""
        self._joining.check_base(identity)
        patience_s = HEARTBEAT_INTERVAL_S * 1.5
        self._joining.patiently(
            partial(claim_name, self.store, state_id=state_id, patience_s=patience_s, stop=self._stop)
        )
        self._has_joined = True
        self._joining.pin_base(identity, state_id=state_id)

    def begin(
        self,
        trainer: Resumes,
        *,
        data: str,
        source: str = "the data",
        training_fields: Callable[[], Fields] = dict,
        fixed: Fixed | None = None,
        vector: DomainVector | None = None,
        clock: Callable[[], float] = time.monotonic,
        exchange: Callable[..., Exchange] = Exchange,
    ) -> None:
        """Put the adapter of the checkpoint, else the expert's weights, into the trainer; then training may start.

        Args:
            trainer: owner of the adapter.
            data: digest of the examples; the position of a checkpoint counts only for the same examples.
            source: name of the examples in messages.
            training_fields: returns the training's part of the heartbeat.
            fixed: rules that are followed from the next start on; None: only `max_length`.
            vector: domain vector to publish; None: none.
            clock: seconds, monotonic.
            exchange: where training and sync meet.

        Raises:
            SettingsError: if the checkpoint is damaged, or another worker's.
        """
        assert self.spec is not None
        assert self.identity is not None
        ledger, trained = self.open_books(trainer, self.spec, data, source)
        ledger.vector = vector
        trainer.adopt(ledger.meta.rules.training)  # until the next pull
        state_dir = self._state_dir
        self.exchange = exchange(
            trainer, with_optimizer=state_dir is not None, trained=trained, spares=ledger.spares
        )
        self.sync = wire(
            self.store, ledger, self.exchange, self.spec,
            identity=self.identity, data=data, state_dir=state_dir, training_fields=training_fields,
            fixed=fixed, checkpoint_interval_s=self._checkpoint_interval_s, clock=clock,
        )  # fmt: skip
        self.thread = threading.Thread(target=self.sync.run, name=f"{SYNC}{self.store.expert}", daemon=True)

    def open_books(
        self, trainer: Resumes, spec: Spec, data: str, source: str = "the data"
    ) -> tuple[Ledger, Trained | None]:
        """The ledger of the checkpoint, else of a new run that starts at the expert's present weights."""
        if saved := self._resume(trainer, spec, data, source):
            return saved
        # Before the pull: an update of an earlier run that is decided after it then is of an earlier incarnation.
        incarnation = self._joining.patiently(self.store.next_incarnation)
        pulled = self._joining.patiently(lambda: pull(self.store, spec, known=""))
        base = pulled.weights
        if base is None:
            raise RefusedError(
                f"expert {self.store.expert!r} was just created again: start this worker again",
                about="lineage",
            )
        with torch.no_grad():
            trainer.flat.copy_(base)
        start = pulled.decided.id if pulled.decided else None
        run = make_run(max(incarnation, start.incarnation + 1 if start else 1), secrets.token_hex(4))
        return Ledger(base=base, packed=pulled.packed, meta=pulled.meta, run=run, start=start), None

    def _resume(self, trainer: Resumes, spec: Spec, data: str, source: str) -> tuple[Ledger, Trained] | None:
        if self._state_dir is None:
            return None
        expert, worker = self.store.expert, self.store.worker
        saved = self._state_dir.load(expert=expert, worker=worker, spec=spec, now=time.monotonic())
        if saved is None:
            return None
        if saved.local.shape != trainer.flat.shape:
            raise SettingsError(
                f"the checkpoint in {self._state_dir.path} is of an adapter of {saved.local.numel()} values, the "
                f"expert's has {trainer.flat.numel()}: move it away to start a new run",
                about="checkpoint",
            )
        with torch.no_grad():
            trainer.flat.copy_(saved.local)
        same_data = saved.data == data
        if same_data:
            trainer.position = saved.position
        else:
            self._report(
                f"the examples of {source} differ from those of the checkpoint (other file, chat template, "
                f"--learn, --validate or max_length): {expert} starts at the first one"
            )
        trainer.load_state(saved.optimizer, same_data=same_data)
        self._report(
            f"resuming run {saved.ledger.run} of {expert} after update {saved.ledger.seq}, example {trainer.position}"
        )
        return saved.ledger, saved.trained

    def finish(self, drain_s: float, *, boundary: Callable[[], None] | None = None) -> str:
        """Publish the rest, wait at most drain_s for the decision, and return how it ended; for the training thread.

        Args:
            drain_s: seconds.
            boundary: called while it waits; the exchange's own by default.

        Raises:
            FedMoEError: one sentence, if something that was trained is lost.
        """
        finish([self], drain_s, boundary=boundary)
        return self.outcome(drain_s)

    def outcome(self, drain_s: float) -> str:
        """How it ended, as a sentence.

        Raises:
            FedMoEError: if something that was trained is lost.
        """
        sync, status = self.sync, self.sync.status
        if isinstance(sync.failure, ProtocolError):
            kept = self._kept() if sync.saved else self._lost()
            raise ProtocolError(f"{sync.failure}; {kept}", about=sync.failure.about)
        if sync.failure is not None:
            raise sync.failure
        left = self.exchange.steps_left
        text = f"updates applied: {status.applied}, refused: {status.refused}; expert at version {status.version}"
        if not sync.ledger.queue and not left:
            return f"done: {text}"
        if sync.saved:
            return f"done: {text}; {self._kept()}"
        if sync.in_redis and not left:
            until = "until the expert is released" if sync.watch.held else "for an aggregator"
            return f"done: {text}; the last one waits in Redis {until}"
        remedy = "start this worker again to go on from there"
        if not self._state_dir:
            remedy = "give it a state directory (--state-dir DIR) to lose nothing next time"
        raise FedMoEError(
            f"{text}; {self._lost()}: no aggregator applied or refused the last update within "
            f"{drain_s:g} s ({status.why_undecided}); {remedy}",
            about="drain",
        )

    def hasten(self) -> None:
        """End the drain of a held expert, whose updates wait, if nothing is lost by it."""
        is_safe = self._state_dir is not None or (self.sync.in_redis and not self.exchange.steps_left)
        if self.sync.watch.held and is_safe:
            self.sync.times.end_at = 0.0

    def _kept(self) -> str:
        assert self._state_dir is not None
        return f"what has no answer yet is kept in {self._state_dir.path}, and the next start sends it"

    def _lost(self) -> str:
        """Which steps are lost if the worker ends now and its last checkpoint does not hold all."""
        sync = self.sync
        steps = self.exchange.steps_left
        if not sync.in_redis:
            steps += sum(update.header.steps for update in sync.ledger.queue)
        are = "is" if steps == 1 else "are"
        if self._state_dir:
            since = f"the last checkpoint in {self._state_dir.path}"
            return f"at most {counted(steps, 'step')} since {since} {are} lost"
        return f"{counted(steps, 'step')} since the last update that is in Redis {are} lost"


def finish(
    members: Sequence[Membership], drain_s: float, *, boundary: Callable[[], None] | None = None
) -> None:
    """Publish the rest and wait at most drain_s seconds for the decisions, for all memberships at the same time."""
    for member in members:
        member.sync.finish(drain_s)
    while waiting := [member for member in members if member.thread.is_alive()]:
        if boundary is not None:
            boundary()
        else:
            pass_boundaries(members)
        for member in waiting:
            member.hasten()
        waiting[0].thread.join(0.02)


def pass_boundaries(members: Iterable[Membership]) -> None:
    """Apply what arrived for each membership's training, between two steps; an interrupt waits until it is whole."""
    with without_interrupt():  # half a boundary would count a correction twice
        for member in members:
            member.exchange.boundary()


def outcomes(members: Mapping[str, Membership], drain_s: float) -> dict[str, str]:
    """By expert, how it ended. Logs all errors but the first, then raises the first."""
    said, errors = {}, dict[str, FedMoEError]()
    for name, member in members.items():
        try:
            said[name] = member.outcome(drain_s)
        except FedMoEError as error:
            errors[name] = error
    for name, member in members.items():
        member.failure = errors.get(name)
        member.elsewhere = tuple(error for other, error in errors.items() if other != name)
    first = next(iter(errors.values()), None)
    for other in errors.values():
        if other is not first:
            logger.warning("%s", other)
    if first:
        for name, sentence in said.items():
            logger.info("%s: %s", name, sentence)
        raise first
    return said


def wire(
    store: WorkerStore,
    ledger: Ledger,
    exchange: Exchange,
    spec: Spec,
    *,
    identity: BaseIdentity,
    data: str,
    state_dir: StateDir | None = None,
    training_fields: Callable[[], Fields] = dict,
    fixed: Fixed | None = None,
    checkpoint_interval_s: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
) -> Sync:
    """The sync of a worker whose ledger is open, with heartbeat and, given a state directory, checkpoints."""
    state_id = state_dir.id if state_dir else ""
    heart = Heartbeat(store, identity, state_id=state_id, training_fields=training_fields, clock=clock)
    return Sync(
        store, ledger, exchange, spec,
        identity=identity, data=data,
        heart=heart, watch=AggregatorWatch(store, heart.hasten),
        saver=Saver(state_dir, clock) if state_dir else None,
        outbox=Outbox(must_pull=bool(ledger.seq)),  # a resumed worker looks first
        fixed=fixed, checkpoint_interval_s=checkpoint_interval_s, clock=clock,
    )  # fmt: skip
