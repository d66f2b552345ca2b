"""FedMoE as a contestant: the real aggregator command, and clients that push and pull with the real books.

A client does what `producers.sync` does for a worker without a state directory (copy, check, make an update, publish,
poll, pull, in this order and with the same pauses, but without heartbeats, one in five seconds); instead of training it
adds small numbers to its adapter.
"""

import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from fedmoe.protocol.layout import AdapterBuffer, Layout
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.records import PROTOCOL, Meta
from fedmoe.protocol.rules import AggregationRules, RuleSet
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import UpdateId, make_run
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.lifecycle import new_id
from fedmoe.store.worker import WorkerStore
from ops.bench.contest import Contestant, Seats
from ops.bench.processes import BenchError
from producers.ledger import Ledger, Outgoing, Trained
from producers.pace import Pace
from producers.pull import pull

FINGERPRINT = "0123456789abcdef"
DEFAULT_FORMAT: str = Spec.__dataclass_fields__["wire_format"].default
KEPT = 6  # decided updates that a worker keeps for a failover, if it syncs every 10 s
RULES = RuleSet(aggregation=AggregationRules(max_norm=1e9, max_staleness=1_000_000))
STEP = 1e-4  # standard deviation of what a client adds to each value of its adapter


def make_spec(layout: Layout, wire_format: str, **changes: object) -> Spec:
    """A spec of that layout without a model behind it."""
    first = layout.tensors[0][1]
    spec = Spec(
        base_model="bench",
        base_config={"hidden_size": first[-1]},
        layout=layout,
        lora=LoraSettings(rank=min(first), alpha=2.0 * min(first)),
        wire_format=wire_format,
    )
    return replace(spec, **changes)


def create_expert(
    url: str, name: str, spec: Spec, *, rules: RuleSet = RULES, fingerprint: str = FINGERPRINT
) -> None:
    """Write a new expert, as an aggregator does that finds its base model."""
    connection = Connection(RedisSettings(url=url))
    buffer = AdapterBuffer(spec.layout)
    buffer.flat.copy_(initial_weights(spec.layout, spec.init_seed))
    commit = new_id()
    meta = Meta(
        lineage=new_id(),
        commit=commit,
        weights_commit=commit,
        spec=spec.digest,
        rules=rules,
        protocol=PROTOCOL,
        base_fingerprint=fingerprint,
    )
    if not ExpertStore(connection, name).create(spec, meta, buffer.file, gateway_weight=1.0):
        raise BenchError(f"expert {name} could not be created")
    connection.close()


def aggregator_command(url: str, experts: Sequence[str], *options: str) -> list[str]:
    """The command line of an aggregator that serves these experts."""
    named = [word for name in experts for word in ("--expert", name)]
    return [sys.executable, "-m", "fedmoe.cli.main", "aggregator", "run", "--redis", url, *named, *options]


class Client:
    """One worker: its connection, books and adapter."""

    def __init__(self, url: str, expert: str, name: str) -> None:
        self.store = WorkerStore(Connection(RedisSettings(url=url)), expert, name)
        self.spec = self.store.spec()
        pulled = pull(self.store, self.spec, known="")
        base = pulled.weights
        assert base is not None
        run = make_run(self.store.next_incarnation(), secrets.token_hex(4))
        self.ledger = Ledger(base=base, meta=pulled.meta, run=run)
        self.local = base.clone()
        self.decided: tuple[UpdateId, int] | None = None  # the last update, and the expert's version with it
        self.took_s = 0.0  # from the beginning of the last update until its weights were in the adapter
        self._began = self.norm = 0.0
        self.next_at = 0.0
        self._step = torch.randn(len(base), generator=torch.Generator().manual_seed(0)) * STEP
        self._eighth = 0
        self._entry = ""
        self._pace = Pace()

    @property
    def busy(self) -> bool:
        """True while an update is in flight."""
        return bool(self.ledger.queue)

    def train(self) -> None:
        """Change an eighth of the adapter a little, each time the next one: training is not what is measured."""
        self._eighth = (self._eighth + 1) % 8
        size = -(-len(self._step) // 8)
        here = slice(self._eighth * size, (self._eighth + 1) * size)
        self.local[here] += self._step[here]

    def make_update(self) -> Outgoing:
        """Make the progress an update."""
        trained = Trained(n_examples=4, n_tokens=400, steps=1, loss_sum=1.0, position="4")
        self._began = time.monotonic()
        copy = self.ledger.spares.copy(self.local)  # as the training makes it at a step boundary, to go on
        cut = self.ledger.cut(copy, self.spec.wire_format)
        self.ledger.spares.give(copy)
        self.norm = cut.norm
        update = self.ledger.make_update(cut, trained, fingerprint=FINGERPRINT)
        self.ledger.keep_decided_bytes = KEPT * update.header.payload_bytes
        return update

    def publish(self, update: Outgoing) -> None:
        """Write it to Redis; the first poll is due a little later."""
        self._entry = self.store.publish(update.header, update.parts)
        self.next_at = time.monotonic() + self._pace.sent()

    def turn(self) -> int:
        """The next step, if it is due; returns how many updates that showed to be applied."""
        if not self.busy:
            self.train()
            self.publish(self.make_update())
            return 0
        if time.monotonic() < self.next_at:
            return 0
        update = self.ledger.queue[0]
        poll = self.store.poll(self._entry, update.header)
        if (poll.decided.id if poll.decided else None) != self.ledger.head:
            self._pace.decided()
            return self.pull(poll.weights_commit)
        if not poll.entry_waits:
            raise BenchError(f"update {update.id} is gone without a decision")
        self.next_at = time.monotonic() + self._pace.undecided()
        return 0

    def pull(self, seen: str = "") -> int:
        """Read the expert, settle the books, correct the adapter; returns how many updates were applied."""
        mine = self.ledger.meta.weights_commit
        spares = self.ledger.spares
        pulled = pull(self.store, self.spec, known=mine if seen == mine else "", spares=spares)
        change = self.ledger.observe(pulled.meta, pulled.weights, pulled.decided, now=time.monotonic())
        if change.how is not None and change.how.how != "applied":
            raise BenchError(f"update {change.how.id} was {change.how.how}: {change.how.reason}")
        if change.replace or change.resent:
            raise BenchError("the expert's history is not the one that this client knew")
        if change.correction is not None:
            self.local += change.correction
            spares.give(change.correction)
        if change.how is not None:
            self.decided = (change.how.id, change.how.version)
            self.took_s = time.monotonic() - self._began
        return len(change.decided)


def serve_clients(seats: Seats, index: int, url: str, workers: Sequence[tuple[str, str]]) -> None:
    """Body of a client process: (expert, name) of each worker that it plays, in turn."""
    clients = [Client(url, expert, name) for expert, name in workers]
    while True:
        if not any(client.busy for client in clients):
            seats.wait_for_go(index)
        going = seats.go.is_set()
        at_work = [client for client in clients if going or client.busy]
        for client in at_work:
            if client.turn():
                seats.count(index, client.took_s)
        if at_work and all(client.busy for client in at_work):
            time.sleep(max(0.0, min(client.next_at for client in at_work) - time.monotonic()))


class FedMoE(Contestant):
    """An aggregator, its Redis, and workers spread over client processes.

    Args:
        aof: with the append-only file, everysec; tls: over TLS; redis_options: further options of the server.
        experts, workers: how many; each worker trains one expert, in turn.
        n_clients: processes that play the workers.
    """

    def __init__(
        self,
        name: str,
        layout: Layout,
        wire_format: str,
        *,
        aof: bool = False,
        tls: bool = False,
        redis_options: Sequence[str] = (),
        experts: int = 1,
        workers: int = 3,
        n_clients: int = 3,
    ) -> None:
        super().__init__(name, n_clients=min(n_clients, workers))
        self.spec = make_spec(layout, wire_format)
        self.rules = RULES
        self.aof, self.tls = aof, tls
        self.redis_options = redis_options
        self.experts = [f"expert{number}" for number in range(experts)]
        self.workers = [(self.experts[n % experts], f"worker{n}") for n in range(workers)]

    def _start(self) -> None:
        url = self.processes.redis(aof=self.aof, tls=self.tls, options=self.redis_options)
        for name in self.experts:
            create_expert(url, name, self.spec, rules=self.rules)
        self.processes.command("aggregator", *aggregator_command(url, self.experts))
        for index in range(self.n_clients):
            mine = self.workers[index :: self.n_clients]
            self.processes.call("clients", serve_clients, self.seats, index, url, mine)
