"""Worker and aggregator as step machines made of the project's own code.

An actor's memory between two turns of its loop is an immutable value. `turn(memory, replies, choice)` rebuilds the
real objects from it (here ExpertServer, ExpertStore and Expert; in `worker` Sync, Ledger and Exchange),
runs one turn of the real loop against the replies so far, and returns the memory after it, or raises Suspended with
the request that comes next.
"""

import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import consumers.aggregator
import consumers.compaction
import consumers.expert
from consumers.aggregator import ExpertServer
from consumers.expert import Expert
from consumers.history import History
from fedmoe.protocol.features import features_text
from fedmoe.protocol.growth import Growth
from fedmoe.protocol.keys import Keys
from fedmoe.protocol.layout import Layout, stamped
from fedmoe.protocol.packed import pack_file
from fedmoe.protocol.records import PROTOCOL, Decided, Meta
from fedmoe.protocol.rules import NESTEROV, AggregationRules, RuleSet
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.staleness import Decay
from fedmoe.settings import AggregatorSettings
from fedmoe.store.change import change_rules
from fedmoe.store.connection import Command, Connection, RedisSettings
from fedmoe.store.expert import ExpertStore
from fedmoe.store.rollback import roll_back
from fedmoe.store.worker import WorkerStore
from tests.protocol.client import Client, Port, streamed
from tests.protocol.world import FOR_PEOPLE, KEYS, NAME, Db, Reply, Request, Suspended

NEW_LR = 0.5  # what the operator sets; then an update weighs half
NEW_ID = Request((("NEWID",),))  # answered by the search: an id that occurs nowhere
QUIET_INTERVALS = 9  # over once it is time to reclaim
MOST_FIELDS = 4  # of a tail: two updates, each a record and one part
HISTORY = 4  # commits that an aggregator remembers: more make more states, and nothing new
Values = tuple[float, ...]


def make_spec(workers: int, units: int, wire_format: str = "fp32") -> Spec:
    """One value for each (worker, unit of training); in bf16 they are exact, too, and the expert has a tail."""
    layout = Layout.of([("x", (workers * units,))])
    return Spec(base_model="m", base_config={}, layout=layout, wire_format=wire_format)


def first_rules(max_staleness: int, max_norm: float, momentum: float) -> RuleSet:
    """Every applied update weighs 1."""
    optimizer = {"server_optimizer": NESTEROV, "server_momentum": momentum} if momentum else {}
    aggregation = AggregationRules(
        decay=Decay(kind="constant"), max_staleness=max_staleness, max_norm=max_norm, **optimizer
    )
    return RuleSet(aggregation=aggregation)


def first_file(spec: Spec) -> bytes:
    """Weights of zeros."""
    return stamped(spec.layout.header + bytes(4 * spec.layout.numel), "c0")


def first_db(spec: Spec, rules: RuleSet) -> Db:
    """A new expert of zeros."""
    meta = Meta(
        lineage="L",
        commit="c0",
        weights_commit="c0",
        spec=spec.digest,
        rules=rules,
        protocol=PROTOCOL,
        knows=features_text(),
        base_fingerprint="f",
        loss=0.0,
        reach=1.0,
    )
    strings = {KEYS.spec: spec.to_json().encode(), KEYS.weights: first_file(spec)}
    if packed := pack_file(first_file(spec), spec, "c0"):
        strings[KEYS.packed] = packed
    return Db(
        strings=tuple(sorted(strings.items())),
        hashes=((KEYS.meta, tuple(sorted(meta.to_hash().items()))),),
    )


REDIS, AGGREGATOR = RedisSettings(), AggregatorSettings()  # checked once, not in each of a million turns


class ModelConnection(Connection):
    """A connection of the project, over a Port instead of a socket."""

    cluster = None

    def __init__(self, client: Client, *, counts: bool = True) -> None:
        self.settings = REDIS
        self.keys = Keys()
        self.client = client
        self._counts = counts
        self._cut_off = threading.Event()

    @property
    def generation(self) -> int:
        """Connections made since the turn began."""
        return self.client.port.generation if self._counts else 0

    def stream(self, commands: Sequence[Command], *, ahead: int = 4) -> Generator[Any, None, None]:
        """As one request; but whatever happens may happen between a copy of a part and its use."""
        asked = [streamed(command) for command in commands]
        each = [Request((one,)) for one in asked]
        for request in each if any(one.copies for one in each) else [Request(tuple(asked))][: len(asked)]:
            yield from self.client.port.ask(request)


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
    throughout: tuple[tuple[Any, str, Any], ...] = ()  # for the checks, too
    commit_ids: Callable[[Expert], str] | None = None
    watches: bool = True
    group_start: str = "0"
    counts_connections: bool = True
    reclaims_now_and_then: bool = True
    saves_before: bool = True
    new_run_at_start: bool = True
    server: type[ExpertServer] = ExpertServer
    keep_decided_s: float = 60.0
    change: Callable[..., Any] = change_rules
    roll_back: Callable[..., Any] = roll_back
    history: int = HISTORY


class Served(NamedTuple):
    """What an aggregator remembers of the expert; kept after an error, no longer `loaded`, to be written back."""

    loaded: bool = False
    weights: bytes = b""
    server_state: bytes | None = None
    optimizer: str = ""
    meta: Meta | None = None
    decided: tuple[tuple[str, Decided], ...] = ()
    vectors: tuple[tuple[str, str], ...] = ()
    same_connection: bool = True
    failure: str = ""
    claimed: bool = False  # it told the server what it remembers; by the next turn all others had the time to
    history: tuple[tuple[str, bytes], ...] = ()
    attempted: tuple[str, bytes] | None = None


class Unexpected(BaseException):
    """The code met an exception that it has no sentence for."""


def told_damage(problem: str) -> str:
    """What people are told of damage to an expert, or nothing: where it is damaged, the checks find that before."""
    return problem if " in Redis is damaged: " in problem else ""


def raise_unexpected(*_: object) -> None:
    raise Unexpected(repr(sys.exc_info()[1]))


class Aggregator:
    """An aggregator of one expert; a choice of 1 means that it is time to reclaim."""

    def __init__(self, name: str, spec: Spec, rules: Rules) -> None:
        self.name = name
        self.first = Served()
        self._spec = spec
        self._rules = rules

    def choices(self, memory: Served, db: Db) -> tuple[int, ...]:
        """With nothing pending it makes no difference whether it reclaims, unless the expert is held or has a tail."""
        more = memory.meta and (memory.meta.rules.held or memory.meta.tail)
        due = memory.loaded and (db.pending or more) and self._rules.reclaims_now_and_then
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
        server = rules.server(
            connection,
            NAME,
            AGGREGATOR,
            holder=self.name,
            clock=lambda: 0.0 if choice == 0 else 99.0,
        )
        store = server.store = rules.expert_store(connection, NAME)
        told: list[str] = []
        server.problems.report = told.append  # for people; nobody decides by it
        store.mend = lambda: False  # ids are the model's own
        server.is_serving = memory.loaded
        server.recovery.claimed_at = -99.0 if memory.claimed else None
        server.recovery.store = store
        history = server.history = History(rules.history)
        history.lines, history.attempted = dict(memory.history), memory.attempted
        if memory.meta:
            expert = server.retained = self._expert(store, self._spec, history=history)
            expert.held.load(memory.weights, memory.server_state, memory.optimizer)
            expert.meta, expert.decided = memory.meta, dict(memory.decided)
            expert.vectors = dict(memory.vectors)
            same = memory.same_connection or not rules.counts_connections
            expert.generation = 0 if same else -1
        rescue = server.rescue

        def rescue_and_end(expert: Expert) -> None:
            """What comes after a rescue is what the next turn does."""
            rescue(expert)
            raise TurnOver

        server.rescue = rescue_and_end
        with self._in_place(port, server):
            try:
                server.run(OneTurn())
            except Unexpected as error:
                return Served(failure=f"{self.name}: {error}")
            except TurnOver:
                pass
            except Suspended as suspended:
                suspended.remembers, suspended.counts = server.retained is not None, server.is_serving
                raise
        if wrong := "; ".join(filter(told_damage, told)):
            return Served(failure=f"{self.name} finds damage where none is: {wrong}")
        expert = server.retained
        remembered = Served(history=tuple(history.lines.items()), attempted=history.attempted)
        if expert is None:
            return remembered
        meta = replace(expert.meta, **dict.fromkeys(FOR_PEOPLE, 0))
        return remembered._replace(
            loaded=server.is_serving,
            weights=bytes(expert.buffer.file),
            server_state=None if expert.held.state_file is None else bytes(expert.held.state_file),
            optimizer=expert.held.optimizer,
            meta=meta,
            decided=tuple(sorted(expert.decided.items())),
            vectors=tuple(sorted(expert.vectors.items())),
            same_connection=expert.generation == connection.generation or not server.is_serving,
            claimed=server.recovery.claimed_at is not None and not server.is_serving,
        )

    def remembers(self, memory: Served) -> bool:
        """True if it can write the expert back."""
        return memory.meta is not None

    def without_use(self, memory: Served) -> Served:
        """The memory, where the server cannot lose anything any more: what is not loaded is for nothing."""
        kept = memory if memory.loaded or memory.failure else Served()
        return kept._replace(history=(), attempted=None)

    def _expert(self, store: ExpertStore, spec: Spec, *, history: History, **_: Any) -> Expert:
        return self._rules.expert(store, spec, aggregator="any", history=history, clock=lambda: 0.0)

    @contextmanager
    def _in_place(self, port: Port, server: ExpertServer) -> Iterator[None]:
        """Ids of commits from the search, and what the rules replace."""

        def new_id() -> str:
            if self._rules.commit_ids and server.retained:
                return self._rules.commit_ids(server.retained)
            return str(port.ask(NEW_ID)[0])

        replaced = (
            (consumers.compaction, "QUIET_INTERVALS", QUIET_INTERVALS),
            (Growth, "_is_too_heavy", lambda growth: growth.tail.fields > MOST_FIELDS),
            *self._rules.patches,
            (consumers.expert, "new_id", new_id),
            (consumers.aggregator, "Expert", self._expert),
            (consumers.aggregator.logger, "exception", raise_unexpected),
        )
        patches = [patch.object(*where) for where in replaced]
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()
