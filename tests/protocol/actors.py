"""Worker and aggregator as step machines made of the project's own code.

An actor's memory between two turns of its loop is an immutable value. `turn(memory, replies, choice)` rebuilds the
real objects from it (ExpertServer with ExpertStore, Expert and Ledger's counterpart; Sync with Ledger and Exchange),
runs one turn of the real loop against the replies so far, and returns the memory after it, or raises Suspended with
the request that comes next. Only the start of a worker is a copy: `producers.worker` needs a model for it.

Step k of a worker's training adds 1 to its value k. So in any weights a 0 is a step lost and a 2 a step doubled.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

import consumers.aggregator
import consumers.expert
import producers.sync
from consumers.aggregator import AggregatorSettings, ExpertServer
from consumers.expert import Expert
from fedmoe.keys import Keys
from fedmoe.layout import Layout, values_of
from fedmoe.records import Decided, Meta
from fedmoe.spec import MergeRules, Spec
from fedmoe.staleness import Decay
from fedmoe.store.connection import Connection, RedisSettings
from fedmoe.store.expert import ExpertStore
from fedmoe.store.worker import WorkerStore
from fedmoe.update import UpdateId, make_run
from producers.checkpoint import Checkpoint
from producers.exchange import Cut, Exchange
from producers.ledger import Change, Ledger, Outgoing, Trained
from producers.sync import Sync
from tests.protocol.world import FOR_PEOPLE, KEYS, NAME, Client, Db, Port, Reply, Request

NEW_ID = Request((("NEWID",),))  # answered by the search: an id that occurs nowhere
Values = tuple[float, ...]


def make_spec(workers: int, units: int, max_staleness: int) -> Spec:
    """One value for each (worker, unit of training); every applied update weighs 1, so values stay whole."""
    merge = MergeRules(decay=Decay(kind="constant"), max_staleness=max_staleness)
    return Spec(base_model="m", base_config={}, layout=Layout.of([("x", (workers * units,))]), merge=merge)


def first_db(spec: Spec) -> Db:
    """A new expert of zeros."""
    file = spec.layout.header + bytes(4 * spec.layout.numel)
    meta = Meta(lineage="L", commit="c0", weights_commit="c0", spec=spec.digest, base_fingerprint="f", loss=0.0)
    return Db(
        strings=((KEYS.weights, file),),
        hashes=((KEYS.meta, tuple(sorted(meta.to_hash().items()))),),
    )


class ModelConnection(Connection):
    """A connection of the project, over a Port instead of a socket."""

    def __init__(self, client: Client, *, counts: bool = True) -> None:
        self.settings = RedisSettings()
        self.keys = Keys()
        self.client = client
        self._counts = counts

    @property
    def generation(self) -> int:  # type: ignore[override]
        """Connections made since the turn began."""
        return self.client.port.generation if self._counts else 0


class TurnOver(BaseException):
    """The turn that was asked for is over."""


class OneTurn:
    """Stands for the events that a loop waits on: lets it make one turn."""

    def __init__(self) -> None:
        self._begun = False

    def is_set(self) -> bool:
        if self._begun:
            raise TurnOver
        self._begun = True
        return False

    def wait(self, timeout: float) -> bool:
        return False


class OneWait(OneTurn):
    """The same for a loop that waits once a turn."""

    def wait(self, timeout: float) -> bool:
        raise TurnOver


@dataclass(frozen=True)
class Rules:
    """Where a rule of the protocol can be taken out: classes and replacements, the project's own by default."""

    expert: type[Expert] = Expert
    expert_store: type[ExpertStore] = ExpertStore
    worker_store: type[WorkerStore] = WorkerStore
    patches: tuple[tuple[Any, str, Any], ...] = ()
    commit_ids: Callable[[Expert], str] | None = None
    watches: bool = True
    group_start: str = "0"
    counts_connections: bool = True
    reclaims_now_and_then: bool = True
    saves_before: bool = True
    new_run_at_start: bool = True
    keep_decided_s: float = 60.0


class Served(NamedTuple):
    """What an aggregator remembers of the expert."""

    loaded: bool = False
    weights: bytes = b""
    meta: Meta | None = None
    applied: tuple[tuple[str, Decided], ...] = ()
    same_connection: bool = True
    failure: str = ""


class Unexpected(BaseException):
    """The code met an exception that it has no sentence for."""


def _unexpected(*_: object) -> None:
    raise Unexpected(repr(sys.exc_info()[1]))


class Aggregator:
    """An aggregator of one expert; a choice of 1 means that it is time to reclaim."""

    def __init__(self, name: str, spec: Spec, rules: Rules) -> None:
        self.name = name
        self.first = Served()
        self._spec = spec
        self._rules = rules

    def choices(self, memory: Served, db: Db) -> tuple[int, ...]:
        """With nothing pending it makes no difference whether it reclaims."""
        due = memory.loaded and db.pending and self._rules.reclaims_now_and_then
        return (0, 1) if due else (0,)

    def fair_choice(self, memory: Served) -> int:
        """Time passes, so it reclaims."""
        return int(self._rules.reclaims_now_and_then)

    def crashed(self, memory: Served) -> Served:
        """Nothing is left."""
        return Served()

    def check(self, memory: Served) -> str:
        """Only errors: an aggregator's memory is worth nothing until it is committed."""
        return memory.failure

    def turn(self, memory: Served, replies: Sequence[Reply], choice: int) -> Served:
        """One turn of ExpertServer.run."""
        rules = self._rules
        port = Port(replies)
        client = Client(port, group_start=rules.group_start, watches=rules.watches)
        connection = ModelConnection(client, counts=rules.counts_connections)
        server = ExpertServer(
            connection, NAME, AggregatorSettings(), holder=self.name, clock=lambda: 0.0 if choice == 0 else 99.0
        )
        store = server._store = rules.expert_store(connection, NAME)
        expert = server._expert = rules.expert(store, self._spec, aggregator="any", clock=lambda: 0.0)
        server._loaded = memory.loaded
        if memory.meta:
            expert.buffer.load(memory.weights)
            expert.meta, expert.applied = memory.meta, dict(memory.applied)
            same = memory.same_connection or not rules.counts_connections
            expert.generation = 0 if same else -1
        with self._in_place(port, expert):
            try:
                server.run(OneTurn())  # type: ignore[arg-type]
            except Unexpected as error:
                return Served(failure=f"{self.name}: {error}")
            except TurnOver:
                pass
        if not server._loaded:
            return Served()
        return Served(
            loaded=True,
            weights=bytes(expert.buffer.file),
            meta=replace(expert.meta, **dict.fromkeys(FOR_PEOPLE, 0)),
            applied=tuple(sorted(expert.applied.items())),
            same_connection=expert.generation == connection.generation,
        )

    @contextmanager
    def _in_place(self, port: Port, expert: Expert) -> Iterator[None]:
        """Ids of commits from the search, and what the rules replace."""

        def new_id() -> str:
            return self._rules.commit_ids(expert) if self._rules.commit_ids else str(port.ask(NEW_ID)[0])

        replaced = (
            *self._rules.patches,
            (consumers.expert, "new_id", new_id),
            (consumers.aggregator.logger, "exception", _unexpected),
        )
        patches = [patch.object(*where) for where in replaced]
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()


class Books(NamedTuple):
    """A Ledger as a value."""

    base: Values
    meta: Meta
    run: str
    seq: int
    start: UpdateId | None
    queue: tuple[Outgoing, ...]
    kept: tuple[Outgoing, ...]

    @classmethod
    def of(cls, ledger: Ledger) -> "Books":
        queue, kept = tuple(ledger.queue), tuple(ledger.kept)
        return cls(_values(ledger.base), ledger.meta, ledger.run, ledger.seq, ledger.start, queue, kept)

    def open(self, keep_decided_s: float) -> Ledger:
        content = self._asdict() | {"queue": list(self.queue), "kept": list(self.kept)}
        content["base"] = torch.tensor(self.base)
        return Ledger(**content, keep_decided_s=keep_decided_s)


class Saved(NamedTuple):
    """A checkpoint."""

    books: Books
    local: Values
    trained: Trained
    position: int


class Working(NamedTuple):
    """What a worker remembers, its disk, and for the checks which units were refused with a word, or died with it or
    with the lineage.

    `began`: the first unit of this process, if it has no disk to go on from; `starts`: how often it was started.
    """

    books: Books | None = None
    local: Values = ()
    trained: Trained = Trained()
    position: int = 0
    entry: str | None = None
    must_pull: bool = False
    unsaved: tuple[Values, int] | None = None
    disk: Saved | None = None
    told: frozenset[int] = frozenset()
    died: frozenset[int] = frozenset()
    began: int = 0
    starts: int = 1
    left: bool = False
    failure: str = ""


def _values(flat: torch.Tensor) -> Values:
    return tuple(flat.tolist())


@dataclass
class _Trainer:
    """Adds 1 to the next value of the worker at each step."""

    flat: torch.Tensor
    position: int

    def state(self) -> Mapping[str, torch.Tensor]:
        return {}


@dataclass(frozen=True)
class _Step:
    loss: float = 0.0
    applied: bool = True
    n_examples: int = 1
    n_tokens: int = 1


class _Exchange(Exchange):
    """The meeting point, in one thread: training passes a boundary whenever the sync asks for a copy."""

    def __init__(self, trainer: _Trainer, trained: Trained, ledger: Ledger) -> None:
        super().__init__(trainer, with_optimizer=True, trained=trained)
        self.told: set[UpdateId] = set()
        self.new_lineage = False

    def take(self, timeout_s: float) -> Cut | None:
        self.boundary()
        return super().take(0.0)

    def correct(self, change: Change) -> None:
        if change.how and change.how.how == "refused":
            self.told.add(change.how.id)
        self.new_lineage |= change.replace
        super().correct(change)


@dataclass
class _Disk:
    """A state directory; without `saves_before` nothing is written while an update is in flight."""

    saved: Saved | None
    saves_before: bool

    def save(self, checkpoint: Checkpoint) -> None:
        if self.saves_before or not checkpoint.ledger.queue:
            books = Books.of(checkpoint.ledger)
            self.saved = Saved(books, _values(checkpoint.local), checkpoint.trained, checkpoint.position)


class Worker:
    """A worker that trains `units` steps and publishes each; a choice of 1 means: write a checkpoint meanwhile.

    Right after a cut it trains on, so that there is progress while the update is in flight.
    """

    def __init__(
        self, name: str, spec: Spec, rules: Rules, *, offset: int, units: int, disk: bool, checkpoints: bool
    ) -> None:
        self.name = name
        self.first = Working()
        self.units = units
        self.offset = offset
        self._spec = spec
        self._rules = rules
        self._has_disk = disk
        self._checkpoints = checkpoints

    def choices(self, memory: Working, db: Db) -> tuple[int, ...]:
        """A checkpoint while an update is in flight."""
        worth = memory.books and memory.books.queue and not memory.unsaved and not memory.must_pull
        return (0, 1) if worth and self._checkpoints and self._has_disk else (0,)

    def fair_choice(self, memory: Working) -> int:
        return 0

    def crashed(self, memory: Working) -> Working:
        """What is left: the disk. Without one, what it trained may be lost, and it goes on with fresh data."""
        left = Working(disk=memory.disk, told=memory.told, died=memory.died, starts=memory.starts + 1)
        if self._has_disk:
            return left
        died = memory.died | set(range(memory.began, memory.position))
        return left._replace(died=died, began=memory.position, position=memory.position)

    def left(self, memory: Working) -> Working | None:
        """The worker after it left, because all is trained and its last update waits in Redis; None if it is not so."""
        books = memory.books
        if not books or memory.left or len(books.queue) != 1 or memory.entry is None or memory.trained.steps:
            return None
        return memory._replace(left=True)

    def turn(self, memory: Working, replies: Sequence[Reply], choice: int) -> Working:
        """One turn of Sync, then training."""
        if memory.failure or memory.left:
            return memory
        port = Port(replies)
        store = self._rules.worker_store(ModelConnection(Client(port)), NAME, self.name)
        if memory.books is None:
            memory = self._start(memory, store)
            assert memory.books
            ledger = memory.books.open(self._rules.keep_decided_s)
            trainer = _Trainer(torch.tensor(memory.local), memory.position)
            return self._train(memory, ledger, trainer, _Exchange(trainer, memory.trained, ledger))
        ledger = memory.books.open(self._rules.keep_decided_s)
        trainer = _Trainer(torch.tensor(memory.local), memory.position)
        exchange = _Exchange(trainer, memory.trained, ledger)
        disk = _Disk(memory.disk, self._rules.saves_before) if self._has_disk else None
        sync = Sync(
            store, ledger, exchange, self._spec, fingerprint="f", state_dir=disk, data="d",  # type: ignore[arg-type]
            must_pull=memory.must_pull, clock=lambda: 0.0,
        )  # fmt: skip
        sync._next_cut, sync._next_beat = 0.0, math.inf
        sync._next_save = 0.0 if choice else math.inf
        sync._entry = memory.entry
        if memory.unsaved:
            local, position = memory.unsaved
            sync._unsaved = Cut(local=torch.tensor(local), trained=Trained(), position=position)
        sync._wake = OneWait()  # type: ignore[assignment]
        failure = ""
        try:
            with patch.object(producers.sync.logger, "exception", _unexpected):
                sync._serve()
        except Unexpected as error:
            failure = f"worker {self.name}: {error}"
        except TurnOver:
            pass
        exchange.boundary()
        told = {
            unit for u in ledger.kept if u.id in exchange.told for unit in self._units(u.values(len(ledger.base)))
        }
        memory = memory._replace(
            entry=sync._entry,
            must_pull=sync._must_pull,
            unsaved=(_values(sync._unsaved.local), sync._unsaved.position) if sync._unsaved else None,
            disk=disk.saved if disk else None,
            told=memory.told | told,
            failure=failure or str(sync.failure or ""),
        )
        if exchange.new_lineage:
            died = frozenset(range(trainer.position))
            memory = memory._replace(died=memory.died | died, began=trainer.position)
        return self._train(memory, ledger, trainer, exchange)

    def _start(self, memory: Working, store: WorkerStore) -> Working:
        """As producers.worker.Worker._open_books does."""
        if memory.disk:
            books, local, trained, position = memory.disk
            return memory._replace(
                books=books, local=local, trained=trained, position=position, must_pull=bool(books.seq)
            )
        snapshot = store.pull(known="")
        assert snapshot.weights is not None
        base = _values(values_of(self._spec.layout, snapshot.weights))
        start = snapshot.decided.id if snapshot.decided else None
        epoch, nonce = (start.epoch + 1 if start else 1), f"{memory.starts:08x}"
        run = make_run(epoch, nonce) if self._rules.new_run_at_start else make_run(1, "0" * 8)
        return memory._replace(books=Books(base, snapshot.meta, run, 0, start, (), ()), local=base)

    def _train(self, memory: Working, ledger: Ledger, trainer: _Trainer, exchange: Exchange) -> Working:
        if self._has_disk and not self._rules.saves_before and not ledger.queue:
            saved = Saved(Books.of(ledger), _values(trainer.flat), exchange._trained, trainer.position)
            memory = memory._replace(disk=saved)
        # A worker that was started again trains more for an update than the first time.
        while exchange.steps_left < min(memory.starts, 2) and trainer.position < self.units:
            trainer.flat[self.offset + trainer.position] += 1
            trainer.position += 1
            exchange.record(_Step())
        return memory._replace(
            books=Books.of(ledger), local=_values(trainer.flat), trained=exchange._trained, position=trainer.position
        )

    def _units(self, values: torch.Tensor) -> list[int]:
        mine = values[self.offset : self.offset + self.units]
        return [unit for unit, value in enumerate(mine.tolist()) if value]

    def check(self, memory: Working) -> str:
        """What is wrong with the books, or nothing."""
        if memory.failure:
            return f"worker {self.name} gave up: {memory.failure}"
        if memory.books is None:
            return ""
        ledger = memory.books.open(0.0)
        progress = self._units(ledger.progress(torch.tensor(memory.local)))
        uncut = list(range(memory.position - memory.trained.steps, memory.position))
        if progress != uncut:
            return f"worker {self.name}: progress holds units {progress}, in no update are {uncut}"
        mine = memory.local[self.offset : self.offset + self.units]
        for unit, value in enumerate(mine):
            once = memory.began <= unit < memory.position and unit not in memory.told
            if value not in ((1.0,) if once else (0.0, 1.0)):
                return f"worker {self.name}: unit {unit} is {value:g} times in local"
        return ""

    def check_rest(self, memory: Working, weights: Values) -> str:
        """What is wrong when nothing moves any more, or nothing."""
        if memory.left:
            lost = [u for u in range(self.units) if not weights[self.offset + u] and u not in memory.died]
            return f"worker {self.name} left, and units {lost} are lost" if lost else ""
        if memory.books is None or memory.books.queue or memory.trained.steps or memory.position < self.units:
            return f"worker {self.name} is stuck"
        for unit in range(self.units):
            if not weights[self.offset + unit] and unit not in memory.told | memory.died:
                return f"worker {self.name}: unit {unit} is lost without a word"
        if memory.local != weights:
            return f"worker {self.name}: local is not the expert's weights at rest"
        return ""
