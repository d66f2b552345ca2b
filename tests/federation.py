"""Small parts that tests put together: a spec of two tensors, an expert, a worker that publishes what it is told."""

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from consumers.aggregator import ExpertServer
from consumers.decide import Admission
from consumers.expert import Expert
from fedmoe.protocol.codec import decode
from fedmoe.protocol.features import features_text
from fedmoe.protocol.keys import GROUP
from fedmoe.protocol.layout import AdapterBuffer, Layout
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.records import PROTOCOL, Meta
from fedmoe.protocol.rules import AggregationRules, RuleSet
from fedmoe.protocol.server import ServerStep
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import make_run
from fedmoe.settings import AggregatorSettings
from fedmoe.store.archive import Archive
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.lifecycle import new_id
from fedmoe.store.worker import WorkerStore
from producers.ledger import Change, Ledger, Outgoing, Trained
from producers.pull import pull

LAYOUT = Layout.of(
    [
        ("base_model.model.layers.0.q_proj.lora_A.weight", (2, 8)),
        ("base_model.model.layers.0.q_proj.lora_B.weight", (6, 2)),
    ]
)
FINGERPRINT = "0123456789abcdef"


def small_spec(*, layout: Layout = LAYOUT, wire_format: str = "fp32") -> Spec:
    """A spec without a model behind it."""
    return Spec(
        base_model="tiny",
        base_config={"hidden_size": 8},
        layout=layout,
        lora=LoraSettings(rank=2, alpha=4.0),
        wire_format=wire_format,
    )


def aggregating(**rules: object) -> RuleSet:
    """A rule set that aggregates so."""
    return RuleSet(aggregation=AggregationRules(**rules))


def admission(*, factor: float = 1.0, staleness: int = 0, max_norm: float = 1e9) -> Admission:
    """An admitted update, folded by sgd."""
    return Admission(staleness, ServerStep(AggregationRules(max_norm=max_norm), factor))


def first_meta(spec: Spec, **changes: object) -> Meta:
    """Meta of a new expert."""
    commit = new_id()
    meta = Meta(
        lineage=new_id(),
        commit=commit,
        weights_commit=commit,
        spec=spec.digest,
        protocol=PROTOCOL,
        knows=features_text(),
        base_fingerprint=FINGERPRINT,
    )
    return replace(meta, **changes)


def meta_of(connection: Connection, name: str = "sql_expert") -> dict[bytes, bytes]:
    """An expert's meta as Redis has it."""
    return dict(connection.client.hgetall(connection.keys.expert(name).meta))


def delta_of(update: Outgoing, numel: int) -> torch.Tensor:
    """Δ (numel,) fp32 as the aggregator decodes it."""
    delta = torch.empty(numel)
    decode(update.parts, update.header.wire_format, delta)
    return delta


def make_expert(
    connection: Connection,
    name: str = "sql_expert",
    spec: Spec | None = None,
    weights: torch.Tensor | None = None,
    archive: Archive | None = None,
    **meta: object,
) -> Expert:
    """Create an expert with weights 0, 1, 2, … (or others) and load it."""
    spec = spec or small_spec()
    store = ExpertStore(connection, name)
    buffer = AdapterBuffer(spec.layout)
    buffer.flat.copy_(torch.arange(spec.layout.numel) if weights is None else weights)
    store.create(spec, first_meta(spec, **meta), buffer.file, gateway_weight=1.0)
    expert = Expert(store, spec, aggregator="test", archive=archive)
    expert.load()
    return expert


class ScriptedWorker:
    """A worker without a model: `train` adds what it is told, `publish` and `pull` are the real ones."""

    def __init__(
        self,
        connection: Connection,
        spec: Spec,
        name: str = "alice",
        expert: str = "sql_expert",
        fingerprint: str = FINGERPRINT,
    ) -> None:
        self.store = WorkerStore(connection, expert, name)
        self.spec = spec
        pulled = pull(self.store, spec, known="")
        assert pulled.weights is not None
        self.local = pulled.weights.clone()
        start = pulled.decided.id if pulled.decided else None
        run = make_run(self.store.next_incarnation(), secrets.token_hex(4))
        self.ledger = Ledger(base=self.local.clone(), meta=pulled.meta, run=run, start=start)
        self.now = 0.0
        self.fingerprint = fingerprint

    def train(self, amount: float | torch.Tensor) -> None:
        """Change the local adapter."""
        self.local = self.local + amount

    def make_update(self, **changes: object) -> Outgoing:
        """Make an update; `changes` falsify fields of its header."""
        trained = Trained(n_examples=4, n_tokens=40, steps=2, loss_sum=3.0, position=str(self.ledger.seq * 4))
        update = self.ledger.make_update(
            self.ledger.cut(self.local, self.spec.wire_format),
            trained,
            fingerprint=self.fingerprint,
        )
        if changes:
            update = replace(update, header=replace(update.header, **changes))
            self.ledger.queue[-1] = update
        return update

    def publish(self, update: Outgoing | None = None) -> str:
        """Publish the first undecided update (or another one)."""
        update = update or self.ledger.queue[0]
        return self.store.publish(update.header, update.parts)

    def push(self, amount: float | torch.Tensor, **changes: object) -> Outgoing:
        """Train, make an update and publish it."""
        self.train(amount)
        update = self.make_update(**changes)
        self.publish(update)
        return update

    def pull(self) -> Change:
        """Pull and settle."""
        self.now += 1.0
        pulled = pull(self.store, self.spec, known=self.ledger.meta.weights_commit)
        change = self.ledger.observe(pulled.meta, pulled.weights, pulled.decided, now=self.now)
        if change.correction is not None:
            self.local = change.correction.clone() if change.replace else self.local + change.correction
        return change


def start_weights() -> torch.Tensor:
    """The weights that `make_expert` gives an expert of `LAYOUT`."""
    return torch.arange(LAYOUT.numel, dtype=torch.float32)


def stored(expert: Expert) -> torch.Tensor:
    """The weights as Redis holds them."""
    buffer = AdapterBuffer(expert.spec.layout)
    buffer.load(expert.store.load().weights)
    return buffer.flat


def waiting(expert: Expert) -> tuple[int, int]:
    """Entries in the stream, and of these pending."""
    redis, key = expert.store.connection.client, expert.store.keys.updates
    return redis.xlen(key), redis.xpending(key, GROUP)["pending"]


class Served(NamedTuple):
    """An aggregator's server of one expert, and the thread that it runs in."""

    server: ExpertServer
    thread: threading.Thread


@contextmanager
def serving(
    connection: Connection,
    holder: str = "one",
    *,
    expert: str = "sql_expert",
    lease_s: float = 1.0,
    block_ms: int = 50,
    keep_updates: Path | None = None,
    burst: bool = False,
    release: bool = True,
    memory: Expert | None = None,
) -> Iterator[Served]:
    """An expert served by the real loop, in a thread; without `release` its lease stays behind, as if it was killed.

    With `memory` it remembers that, as if it had served until now.
    """
    settings = AggregatorSettings(lease_s=lease_s, block_ms=block_ms, keep_updates=keep_updates, burst=burst)
    server = ExpertServer(connection, expert, settings, holder=holder, retained=memory)
    if not release:
        server.lease.release = lambda: None
    stop = threading.Event()
    thread = threading.Thread(target=server.run, args=(stop,))
    thread.start()
    try:
        yield Served(server, thread)
    finally:
        stop.set()
        thread.join()


def serve(expert: Expert) -> list[str]:
    """Read and decide all that waits, as the daemon would; the outcomes in order."""
    entries = expert.store.reclaim() + expert.store.read(block_ms=1, count=100)
    return [verdict.outcome.value for verdict in expert.process(entries)]
