"""A worker as a step machine: the real Sync, Ledger and Exchange, and a disk (see `actors`).

Only the start of a worker is a copy: `Membership.open_books` goes on from a file. Step k of a worker's training
adds 1 to its value k, so in any weights a 0 is a step lost and a 2 a step doubled.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

import producers.sync
from fedmoe.errors import UnknownExpertError
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.records import Meta
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.protocol.server import has_state
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import UpdateId, make_run
from fedmoe.protocol.vectors import DomainVector
from fedmoe.store.worker import WorkerStore
from producers.checkpoint import Checkpoint
from producers.exchange import Exchange, TrainingState
from producers.heartbeat import SyncStatus
from producers.ledger import Change, Ledger, Outgoing, Trained
from producers.outbox import Outbox
from producers.pace import Timetable
from producers.pull import pull
from producers.sync import Sync
from tests.federation import delta_of
from tests.protocol.actors import (
    NEW_LR,
    ModelConnection,
    Rules,
    Unexpected,
    Values,
    raise_unexpected,
    told_damage,
)
from tests.protocol.client import Client, Port
from tests.protocol.world import NAME, Db, Reply

VECTOR = DomainVector(rows=1, values=bytes(2))  # of every worker


class Books(NamedTuple):
    """A Ledger as a value."""

    base: Values
    meta: Meta
    run: str
    seq: int
    start: UpdateId | None
    queue: tuple[Outgoing, ...]
    kept: tuple[Outgoing, ...]
    has_told: bool = False

    @classmethod
    def of(cls, ledger: Ledger) -> "Books":
        queue, kept = tuple(ledger.queue), tuple(ledger.kept)
        base, told = _values(ledger.base), ledger.has_told
        return cls(base, ledger.meta, ledger.run, ledger.seq, ledger.start, queue, kept, told)

    def open(self, keep_decided_s: float) -> Ledger:
        content = self._asdict() | {"queue": list(self.queue), "kept": list(self.kept)}
        content["base"] = torch.tensor(self.base)
        return Ledger(**content, vector=VECTOR, keep_decided_s=keep_decided_s)


class Saved(NamedTuple):
    """A checkpoint."""

    books: Books
    local: Values
    trained: Trained
    position: int


class Working(NamedTuple):
    """What a worker remembers, and its disk.

    For the checks: `told`, units refused with a word; `died`, units lost with a process or a lineage;
    `began`: the first unit of this process, if it has no disk to go on from; `starts`: how often it was started;
    `seen`: for each unit, the units in the adapter on which it was trained.
    """

    books: Books | None = None
    local: Values = ()
    trained: Trained = Trained()
    position: int = 0
    outbox: Outbox = Outbox()
    unsaved: tuple[Values, int] | None = None
    disk: Saved | None = None
    told: frozenset[int] = frozenset()
    died: frozenset[int] = frozenset()
    began: int = 0
    starts: int = 1
    left: bool = False
    failure: str = ""
    incarnation: int = 0  # while it starts
    seen: tuple[tuple[int, frozenset[int]], ...] = ()


def _values(flat: torch.Tensor) -> Values:
    return tuple(flat.tolist())


@dataclass
class _Trainer:
    """Adds 1 to the next value of the worker at each step."""

    flat: torch.Tensor
    position: int

    def state(self, spares: object) -> Mapping[str, torch.Tensor]:
        return {}

    def adopt(self, settings: TrainingSettings) -> None:
        """It counts under any rules."""


@dataclass(frozen=True)
class _Step:
    loss: float = 0.0
    applied: bool = True
    n_examples: int = 1
    n_tokens: int = 1


class _Exchange(Exchange):
    """The meeting point, in one thread: training passes a boundary whenever the sync asks for a copy."""

    def __init__(self, trainer: _Trainer, trained: Trained, ledger: Ledger) -> None:
        super().__init__(trainer, with_optimizer=True, trained=trained, spares=ledger.spares)
        self.told: set[UpdateId] = set()
        self.taken_back: set[int] = set()  # units that were in no update, and that a rollback took back
        self.new_lineage = False

    def take(self, timeout_s: float) -> TrainingState | None:
        self.boundary()
        return super().take(0.0)

    def correct(self, change: Change, *tell: Any) -> None:
        if change.how and change.how.how == "refused":
            self.told.add(change.how.id)
        self.new_lineage |= change.replace and not change.rolled_back
        if change.rolled_back:
            position = self._trainer.position
            self.taken_back |= set(range(position - self.trained.steps, position))
        super().correct(change, *tell)


@dataclass
class _Disk:
    """A state directory, and the Saver that writes to it at once.

    Without `saves_before` nothing is written while an update is in flight.
    """

    saved: Saved | None
    saves_before: bool
    id: str = ""
    problem: str = ""
    is_due: bool = True

    def save(self, checkpoint: Checkpoint, *, meanwhile: Callable[[], None]) -> bool:
        if self.saves_before or not checkpoint.ledger.queue:
            books = Books.of(checkpoint.ledger)
            self.saved = Saved(books, _values(checkpoint.local), checkpoint.trained, checkpoint.position)
        return True


class _Silent:
    """Neither a heartbeat nor a look for an aggregator."""

    is_refused = False

    def beat(self, ledger: Ledger, status: SyncStatus) -> None:
        """Nobody listens."""

    def hasten(self, in_s: float = 0.0) -> None:
        """It never beats."""

    def look(self) -> str:
        """All is well."""
        return ""


class Worker:
    """A worker that trains `units` steps and publishes each; a choice of 1 means: write a checkpoint meanwhile.

    Right after a cut it trains on, so that there is progress while the update is in flight.
    """

    def __init__(
        self,
        name: str,
        spec: Spec,
        rules: Rules,
        *,
        offset: int,
        units: int,
        disk: bool,
        checkpoints: bool,
        notes_seen: bool = False,
    ) -> None:
        self.name = name
        self.first = Working()
        self.units = units
        self.offset = offset
        self._spec = spec
        self._rules = rules
        self._has_disk = disk
        self._checkpoints = checkpoints
        self._notes_seen = notes_seen

    def choices(self, memory: Working, db: Db) -> tuple[int, ...]:
        """A checkpoint while an update is in flight."""
        worth = memory.books and memory.books.queue and not memory.unsaved and not memory.outbox.must_pull
        return (0, 1) if worth and self._checkpoints and self._has_disk else (0,)

    def fair_choice(self, memory: Working) -> int:
        return 0

    def crashed(self, memory: Working) -> Working:
        """What is left: the disk. Without one, what it trained may be lost, and it goes on with fresh data."""
        left = Working(
            disk=memory.disk, told=memory.told, died=memory.died, starts=memory.starts + 1, seen=memory.seen
        )
        if self._has_disk:
            return left
        died = memory.died | set(range(memory.began, memory.position))
        return left._replace(died=died, began=memory.position, position=memory.position)

    def left(self, memory: Working) -> Working | None:
        """The worker after it left, because all is trained and its last update waits in Redis; None if it is not so."""
        books = memory.books
        if (
            not books
            or memory.left
            or len(books.queue) != 1
            or memory.outbox.entry is None
            or memory.trained.steps
        ):
            return None
        return memory._replace(left=True)

    def turn(self, memory: Working, replies: Sequence[Reply], choice: int) -> Working:
        """One turn of Sync, then training."""
        if memory.failure or memory.left:
            return memory
        with ExitStack() as replaced:
            for where in self._rules.patches:
                replaced.enter_context(patch.object(*where))
            return self._turn(memory, replies, choice)

    def _turn(self, memory: Working, replies: Sequence[Reply], choice: int) -> Working:
        port = Port(replies)
        store = self._rules.worker_store(ModelConnection(Client(port)), NAME, self.name)
        if memory.books is None:
            if not memory.disk and not memory.incarnation:
                memory = memory._replace(incarnation=store.next_incarnation())
            try:
                memory = self._start(memory, store)
            except UnknownExpertError as error:
                return memory._replace(failure=told_damage(str(error)))  # and it tries again
            assert memory.books
            ledger = memory.books.open(self._rules.keep_decided_s)
            trainer = _Trainer(torch.tensor(memory.local), memory.position)
            return self._train(memory, ledger, trainer, _Exchange(trainer, memory.trained, ledger))
        ledger = memory.books.open(self._rules.keep_decided_s)
        trainer = _Trainer(torch.tensor(memory.local), memory.position)
        exchange = _Exchange(trainer, memory.trained, ledger)
        disk = _Disk(memory.disk, self._rules.saves_before) if self._has_disk else None
        sync = Sync(
            store, ledger, exchange, self._spec, identity=BaseIdentity(fingerprint="f"), data="d",
            heart=_Silent(), watch=_Silent(), saver=disk, outbox=memory.outbox, clock=lambda: 0.0,
            drops_diverged=False,  # else nothing too large is ever refused
        )  # fmt: skip
        sync.times = Timetable(save_at=0.0 if choice else math.inf)
        if memory.unsaved:
            local, position = memory.unsaved
            sync.unsaved = TrainingState(local=torch.tensor(local), trained=Trained(), position=position)
        failure = ""
        try:
            with patch.object(producers.sync.logger, "exception", raise_unexpected):
                sync.attempt()
        except Unexpected as error:
            failure = f"worker {self.name}: {error}"
        exchange.boundary()
        told = {
            unit
            for u in ledger.kept
            if u.id in exchange.told
            for unit in self._units(delta_of(u, len(ledger.base)))
        }
        memory = memory._replace(
            outbox=sync.outbox,
            unsaved=(_values(sync.unsaved.local), sync.unsaved.position) if sync.unsaved else None,
            disk=disk.saved if disk else None,
            told=memory.told | told | exchange.taken_back,
            failure=failure or str(sync.failure or "") or told_damage(sync.status.problem),
        )
        if exchange.new_lineage:
            died = frozenset(range(trainer.position))
            memory = memory._replace(died=memory.died | died, began=trainer.position)
        return self._train(memory, ledger, trainer, exchange)

    def _start(self, memory: Working, store: WorkerStore) -> Working:
        """As producers.membership.Membership.open_books does."""
        if memory.disk:
            books, local, trained, position = memory.disk
            return memory._replace(
                books=books._replace(has_told=False), local=local, trained=trained, position=position,
                outbox=Outbox(must_pull=bool(books.seq)),
            )  # fmt: skip
        pulled = pull(store, self._spec, known="")
        assert pulled.weights is not None
        base = _values(pulled.weights)
        start = pulled.decided.id if pulled.decided else None
        incarnation, nonce = (
            max(memory.incarnation, start.incarnation + 1 if start else 1),
            f"{memory.starts:08x}",
        )
        run = make_run(incarnation, nonce) if self._rules.new_run_at_start else make_run(1, "0" * 8)
        return memory._replace(
            books=Books(base, pulled.meta, run, 0, start, (), ()), local=base, incarnation=0
        )

    def _train(self, memory: Working, ledger: Ledger, trainer: _Trainer, exchange: Exchange) -> Working:
        if self._has_disk and not self._rules.saves_before and not ledger.queue:
            saved = Saved(Books.of(ledger), _values(trainer.flat), exchange.trained, trainer.position)
            memory = memory._replace(disk=saved)
        # A worker that was started again trains more for an update than the first time.
        while exchange.steps_left < min(memory.starts, 2) and trainer.position < self.units:
            if self._notes_seen:
                units = frozenset(unit for unit, value in enumerate(trainer.flat.tolist()) if value)
                seen = dict(memory.seen) | {self.offset + trainer.position: units}
                memory = memory._replace(seen=tuple(sorted(seen.items())))
            trainer.flat[self.offset + trainer.position] += 1
            trainer.position += 1
            exchange.record(_Step())
        return memory._replace(
            books=Books.of(ledger),
            local=_values(trainer.flat),
            trained=exchange.trained,
            position=trainer.position,
        )

    def _units(self, values: torch.Tensor) -> list[int]:
        mine = values[self.offset : self.offset + self.units]
        return [unit for unit, value in enumerate(mine.tolist()) if value]

    def check(self, memory: Working) -> str:
        """What is wrong with the books, or nothing."""
        if memory.failure:
            return f"worker {self.name} gave up, or finds damage where none is: {memory.failure}"
        if memory.books is None:
            return ""
        ledger = memory.books.open(0.0)
        progress = self._units(ledger.progress(torch.tensor(memory.local)))
        uncut = list(range(memory.position - memory.trained.steps, memory.position))
        if progress != uncut:
            return f"worker {self.name}: progress holds units {progress}, in no update are {uncut}"
        has_momentum = has_state(ledger.meta.rules.aggregation)
        mine = memory.local[self.offset : self.offset + self.units]
        for unit, value in enumerate(mine):
            once = memory.began <= unit < memory.position and unit not in memory.told
            once &= not memory.books.meta.rolled_back.intervals  # check_rest tells which may be gone then
            if has_momentum:  # it repeats a share of a unit, in all less than the unit
                is_right = (NEW_LR if once else 0.0) <= value < 2.0
            else:
                is_right = value in ((NEW_LR, 1.0) if once else (0.0, NEW_LR, 1.0))
            if not is_right:
                return f"worker {self.name}: unit {unit} is {value:g} times in local"
        return ""

    def check_rest(self, memory: Working, weights: Values, gone: frozenset[int]) -> str:
        """What is wrong when nothing moves any more, or nothing; `gone`: units of all workers that were rolled back."""
        if memory.left:
            lost = [
                u
                for u in range(self.units)
                if not weights[self.offset + u] and u not in memory.died and self.offset + u not in gone
            ]
            return f"worker {self.name} left, and units {lost} are lost" if lost else ""
        if memory.books is None or memory.books.queue or memory.trained.steps or memory.position < self.units:
            return f"worker {self.name} is stuck"
        for unit in range(self.units):
            is_gone = unit in memory.told | memory.died or self.offset + unit in gone
            if not weights[self.offset + unit] and not is_gone:
                return f"worker {self.name}: unit {unit} is lost without a word"
        if memory.local != weights:
            return f"worker {self.name}: local is not the expert's weights at rest"
        return ""
