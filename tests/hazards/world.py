"""A federation on a real server, its processes stepped turn by turn: what the scenarios play in.

Aggregators are the project's ExpertServer, workers its Worker's books, Exchange and Sync; only the training is a
counter. Step k of a worker adds 1 to a value of its own, so in any weights a 0 is a step lost and a 2 a step doubled.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import consumers.aggregator
import consumers.gateway.builder
import consumers.verify
import producers.membership
from consumers.rollback import state_from_updates
from fedmoe.errors import NameTakenError
from fedmoe.protocol.exact import exact_values
from fedmoe.protocol.features import features_text
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.layout import AdapterBuffer, values_of
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.records import PROTOCOL, Decided, Entry, Meta
from fedmoe.protocol.rules import AggregationRules, RuleSet, TrainingSettings
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.staleness import Decay
from fedmoe.settings import RedisSettings
from fedmoe.store import change, rollback
from fedmoe.store.archive import Archive
from fedmoe.store.connection import Connection
from fedmoe.store.copies import readings
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.lifecycle import new_id
from producers.checkpoint import StateDir
from producers.exchange import Exchange, TrainingState
from producers.ledger import Change
from tests.hazards.stepping import Killed, Stepper
from tests.hazards.units import FINGERPRINT, LAYOUT, OFFSETS, expect, expect_units
from tests.protocol.actors import OneTurn, TurnOver

EXPERT = "sql_expert"
ROUNDS = 15
Snapshot = Mapping[bytes, tuple[bytes, int]]


@dataclass(frozen=True)
class _Step:
    loss: float = 1.0
    n_examples: int = 1
    n_tokens: int = 1
    applied: bool = True


class Training:
    """A trainer whose step k adds 1 to value k of its worker; its data position is the next step."""

    def __init__(self, name: str, position: int) -> None:
        self.flat = torch.zeros(LAYOUT.numel)
        self.position = position
        self._offset = OFFSETS[name]

    def state(self, spares: object) -> Mapping[str, torch.Tensor]:
        return {}

    def load_state(self, state: Mapping[str, torch.Tensor], *, same_data: bool) -> None:
        assert not state

    def adopt(self, settings: TrainingSettings) -> None:
        """It counts under any rules."""

    def step(self) -> _Step:
        self.flat[self._offset + self.position] += 1
        self.position += 1
        return _Step()


class OneThread(Exchange):
    """The meeting point of training and sync, in one thread; remembers what the sync told the training."""

    def __init__(self, trainer: Training, **options: Any) -> None:
        super().__init__(trainer, **options)
        self.changes: list[Change] = []

    def take(self, timeout_s: float) -> TrainingState | None:
        self.boundary()
        return super().take(0.0)

    def correct(self, change: Change, *tell: Any) -> None:
        self.changes.append(change)
        super().correct(change, *tell)


class WorkerProcess:
    """A worker from its start on; without a state directory its data begins at step `at`."""

    def __init__(self, world: "World", name: str, state: Path | None, at: int) -> None:
        self.state_dir = StateDir(state) if state else None
        member = producers.membership.Membership(
            world.settings, EXPERT, name, state_dir=self.state_dir, wait=False
        )
        member.spec, member.identity = world.spec, BaseIdentity(fingerprint=FINGERPRINT)
        self.world, self.name, self.now = world, name, 0.0
        self.store = member.store
        self.steps = world.step(self.store.connection)
        self.training = Training(name, at)
        member.begin(self.training, data="data", clock=lambda: self.now, exchange=OneThread)
        self.sync = member.sync
        assert isinstance(member.exchange, OneThread)
        self.exchange = member.exchange

    def turn(self, turns: int = 1) -> None:
        """So many turns of the sync's loop; training takes up what they brought."""
        for _ in range(turns):
            self.sync.pace.moved_on()  # nobody waits
            if not (self.sync.failure or self.sync.has_ended):
                self.sync.attempt()
            self.exchange.boundary()

    def train(self, steps: int = 1) -> None:
        """Train some steps."""
        for _ in range(steps):
            self.exchange.boundary()
            self.exchange.record(self.training.step())

    def update_is_due(self) -> None:
        """The sync interval is over."""
        self.now += self.sync.ledger.meta.rules.sync_interval_s

    def push(self, steps: int = 1) -> None:
        """Train, and take turns until the update is published (a lost reply, and it only believes that it is not)."""
        self.train(steps)
        self.update_is_due()
        for _ in range(3):
            self.turn()
            queue = self.sync.ledger.queue
            if queue and self.sync.outbox.sent == queue[-1].id:
                return

    def look(self) -> None:
        """Pull although nothing was trained, as an idle worker does at each sync interval."""
        self.update_is_due()
        self.turn()

    def kill(self) -> None:
        """Kill -9: only the state directory is left."""
        self.store.connection.close()
        if self.state_dir:
            self.state_dir.close()

    def expect_local(self, **wanted: Sequence[float]) -> None:
        """Assert what the local adapter is made of."""
        for name, units in wanted.items():
            expect_units(f"the local adapter of {self.name}", name, self.training.flat, units)

    @property
    def last_decision(self) -> Decided | None:
        """How its last update was decided, as it was told."""
        return next((c.how for c in reversed(self.exchange.changes) if c.how), None)

    @property
    def stopped(self) -> bool:
        """It gave up, because another process bears its name."""
        return isinstance(self.sync.failure, NameTakenError)


class AggregatorProcess:
    """An aggregator of the expert."""

    def __init__(self, world: "World", holder: str) -> None:
        self.connection = world.connect()
        self.steps = world.step(self.connection)
        self.now = 0.0
        self._holder = holder
        self._kept = world.directory / "kept"
        self.forgets()

    def forgets(self) -> None:
        """It is killed and started again, and remembers nothing."""
        settings = consumers.aggregator.AggregatorSettings(block_ms=1, keep_updates=self._kept)
        self.server = consumers.aggregator.ExpertServer(
            self.connection, EXPERT, settings, holder=self._holder, clock=lambda: self.now
        )

    def turn(self, turns: int = 1) -> None:
        """So many turns of its loop, errors included, until somebody kills it."""
        for _ in range(turns):
            with suppress(TurnOver, Killed):
                self.server.run(OneTurn())

    def read(self) -> list[Entry]:
        """XREADGROUP, and pause before deciding."""
        return ExpertStore(self.connection, EXPERT).read(block_ms=1, count=10)

    def decide(self, entries: Sequence[Entry]) -> None:
        """Go on after the pause; the commit may raise StaleStateError."""
        assert self.server.retained
        self.server.retained.process(entries)

    def time_passes(self) -> None:
        """Long enough for whatever it does now and then."""
        self.now += 3600.0


@dataclass
class World:
    """A server, an operator's client, and one expert.

    Args:
        url: of an empty database.
        directory: for state directories and kept updates.
    """

    url: str
    directory: Path
    spec: Spec = field(init=False)
    _rules: RuleSet = field(init=False)
    _open: list[Connection] = field(default_factory=list)
    _workers: list[WorkerProcess] = field(default_factory=list)
    _steppers: list[Stepper] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settings = RedisSettings(url=self.url, timeout_s=5.0)
        operator = self.connect()
        self.redis, self.keys = operator.client, operator.keys.expert(EXPERT)
        self._operator = operator
        self.redis.config_set("hz", 500)  # a blocking read of 1 ms else takes 100

    def connect(self) -> Connection:
        """A connection, closed at the end."""
        self._open.append(Connection(self.settings))
        return self._open[-1]

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.kill()
        for connection in self._open:
            connection.close()

    def create(
        self, *, max_staleness: int = 100, decay: str = "constant", wire_format: str = "fp32", **more: Any
    ) -> None:
        """Create the expert as version 0, with `more` rules of aggregation."""
        self._rules = RuleSet(
            aggregation=AggregationRules(decay=Decay(kind=decay), max_staleness=max_staleness, **more)
        )
        self.spec = Spec(
            base_model="tiny",
            base_config={},
            layout=LAYOUT,
            lora=LoraSettings(rank=2, alpha=4.0),
            wire_format=wire_format,  # units are counted to the bit, so fp32, or bf16 with a tail
        )
        self._write_expert()

    def _write_expert(self) -> None:
        commit = new_id()
        meta = Meta(
            lineage=new_id(), commit=commit, weights_commit=commit, spec=self.spec.digest, rules=self._rules,
            protocol=PROTOCOL, knows=features_text(), base_fingerprint=FINGERPRINT,
        )  # fmt: skip
        buffer = AdapterBuffer(LAYOUT)
        buffer.flat.copy_(initial_weights(LAYOUT, self.spec.init_seed))
        assert ExpertStore(self._operator, EXPERT).create(self.spec, meta, buffer.file, gateway_weight=1.0)

    def new_lineage(self) -> None:
        """What an operator does who begins the expert anew: nothing of before counts any more."""
        self.redis.delete(self.keys.meta, self.keys.weights, self.keys.decided, self.keys.log)
        self._write_expert()

    def change_rules(self, **settings: object) -> None:
        """What `fedmoe expert set` does."""
        change.change_rules(ExpertStore(self._operator, EXPERT), settings)

    def release(self) -> None:
        """What `fedmoe expert release` does."""
        change.release(ExpertStore(self._operator, EXPERT))

    def roll_back_to(self, version: int) -> None:
        """What `fedmoe expert rollback` does."""
        store, kept = ExpertStore(self._operator, EXPERT), self.directory / "kept"

        def find(spec: Spec) -> rollback.VersionState:
            return state_from_updates(self._operator, EXPERT, spec, to=version, directory=kept)

        rollback.roll_back_soon(store, find, by="operator")

    def aggregator(self, holder: str = "A0") -> AggregatorProcess:
        """Start an aggregator."""
        return AggregatorProcess(self, holder)

    def worker(self, name: str, *, state: bool = False, at: int = 0) -> WorkerProcess:
        """Start a worker, with a state directory (the one it had before) or without."""
        self._workers.append(WorkerProcess(self, name, self.directory / name if state else None, at))
        return self._workers[-1]

    def builder(self, holder: str) -> tuple[consumers.gateway.builder.GatewayBuilder, Stepper]:
        """A builder of the gateway."""
        connection = self.connect()
        settings = consumers.gateway.builder.GatewaySettings(method="average")
        steps = self.step(connection)
        return consumers.gateway.builder.GatewayBuilder(
            connection, settings, holder=holder, lease_s=1.0
        ), steps

    def step(self, connection: Connection) -> Stepper:
        """Step the client of a connection."""
        self._steppers.append(Stepper(connection))
        return self._steppers[-1]

    def snapshot(self) -> Snapshot:
        """All that the server holds: what a replica that lags has."""
        return {key: (self.redis.dump(key), max(0, self.redis.pttl(key))) for key in self.redis.scan_iter()}

    def roll_back(self, snapshot: Snapshot) -> None:
        """The server goes back in time, and no client sees its connection break (they are a proxy's)."""
        self.redis.flushdb()
        for key, (content, ttl_ms) in snapshot.items():
            self.redis.restore(key, ttl_ms, content)

    def fail_over(self, snapshot: Snapshot) -> None:
        """A replica that lags becomes the master: back in time, and all connections break."""
        self.roll_back(snapshot)
        self.cut_connections()

    def cut_connections(self) -> None:
        """Break the connections of all processes."""
        self.redis.execute_command("CLIENT KILL TYPE normal SKIPME yes")

    def lease_expires(self) -> None:
        """The holder was paused for longer than its lease, or is dead."""
        self.redis.delete(self.keys.lease)

    def settle(self, aggregator: AggregatorProcess, *workers: WorkerProcess) -> None:
        """Turns without further faults until all is decided; a dead end is a hazard too."""
        for _ in range(ROUNDS):
            aggregator.time_passes()
            aggregator.turn()
            for worker in workers:
                worker.turn()
            waiting = [w for w in workers if w.sync.ledger.queue and not w.stopped]
            if not waiting and not self.entries():
                return
        for worker in waiting:
            expect(False, f"{worker.name}'s update {worker.sync.ledger.queue[0].id.seq} is never decided")
        expect(False, "an entry stays in the stream for ever")

    def entries(self) -> int:
        """Entries in the stream; those that are pending are among them."""
        groups = self.redis.xinfo_groups(self.keys.updates) if self.redis.exists(self.keys.updates) else []
        return max(self.redis.xlen(self.keys.updates), *(group["pending"] for group in groups), 0)

    @property
    def meta(self) -> Meta:
        """The expert's state."""
        return Meta.from_hash(self.redis.hgetall(self.keys.meta))

    @property
    def flat(self) -> torch.Tensor:
        """The expert's exact weights (numel,), as Redis has them."""
        keys = self.keys
        files = ("get", keys.weights), ("get", keys.server_state), ("hgetall", keys.tail)
        for (weights, state, tail, _), copies in readings(self.redis, keys, *files, ("hgetall", keys.meta)):
            parts = {"weights": weights, "server_state": state, "tail": tail, "copies": copies}
            exact = exact_values(self.meta, self.spec, **parts)
        return values_of(LAYOUT, exact.weights)

    def expect_expert(self, **wanted: Sequence[float]) -> None:
        """Assert what the expert is made of."""
        for name, units in wanted.items():
            expect_units("the expert", name, self.flat, units)

    def expect_gateway(self) -> None:
        """Assert that the merged gateway is what a builder makes of the experts as they are now."""
        store = GatewayStore(self._operator)
        before = store.load_merged()
        self.redis.delete(store.keys.meta)
        builder, _ = self.builder("fresh")
        builder.refresh()
        after = store.load_merged()
        assert after
        expect(before and before[1] == after[1], "the gateway is not the merge of the experts")

    def check_faults_happened(self) -> None:
        """A scenario whose fault never came shows nothing."""
        assert not any(stepper.left for stepper in self._steppers), "a fault of the scenario did not happen"

    def expect_replay(self) -> None:
        """Assert that the weights are, byte for byte, those of a sequential run over the log."""
        meta, exact, lines, _ = GatewayStore(self._operator).whole_history(EXPERT)
        found = consumers.verify.replay(self.spec, meta, lines, Archive(self.directory / "kept" / EXPERT))
        expect(not found.problem, f"the log cannot be replayed: {found.problem}")
        same = found.same_values(exact.weights, exact.server_state)
        expect(same, "weights or server state are not those of the log")
