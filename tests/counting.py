"""Training that can be counted: each step adds 1 to every value of an expert that begins at 0 and decays nothing.

So after any fault the books are checked with whole numbers: the weights must equal the number of steps of all workers.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from consumers.verify import replay
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.keys import GROUP
from fedmoe.protocol.layout import AdapterBuffer, Layout, values_of
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.rules import AggregationRules, RuleSet, TrainingSettings
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.staleness import Decay
from fedmoe.settings import RedisSettings
from fedmoe.store.archive import Archive
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from producers.checkpoint import StateDir
from producers.heartbeat import Fields
from producers.membership import Membership, Resumes
from tests.federation import FINGERPRINT, first_meta, small_spec

EXPERT = "sql_expert"
IDENTITY = BaseIdentity(fingerprint=FINGERPRINT)


def counting_spec(n_values: int = 12) -> Spec:
    """A spec whose only tensor (n_values, an even number) is a LoRA B, which begins at 0."""
    layout = Layout.of([("base_model.model.layers.0.q_proj.lora_B.weight", (n_values // 2, 2))])
    return small_spec(layout=layout)


def create_expert(
    connection: Connection, spec: Spec, name: str = EXPERT, *, sync_interval_s: float = 0.05
) -> ExpertStore:
    """Create the expert at its real version 0, under rules that count."""
    aggregation = AggregationRules(decay=Decay(kind="constant"), max_norm=1e9)
    rules = RuleSet(aggregation=aggregation, sync_interval_s=sync_interval_s)
    buffer = AdapterBuffer(spec.layout)
    buffer.flat.copy_(initial_weights(spec.layout, spec.init_seed))
    store = ExpertStore(connection, name)
    assert store.create(spec, first_meta(spec, rules=rules), buffer.file, gateway_weight=1.0)
    return store


@dataclass
class Step:
    """What one step trained."""

    loss: float = 1.0
    n_examples: int = 1
    n_tokens: int = 1
    applied: bool = True


class Counter:
    """A trainer without a model."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.flat = weights.clone()
        self.position = 0

    def state(self, spares: object) -> Mapping[str, torch.Tensor]:
        """There is no optimizer."""
        return {}

    def load_state(self, state: Mapping[str, torch.Tensor], *, same_data: bool) -> None:
        """There is none."""

    def adopt(self, settings: TrainingSettings) -> None:
        """It counts under any rules."""

    def step(self) -> Step:
        """Add 1 to every value."""
        self.flat += 1
        self.position += 1
        return Step()


def join(
    redis: RedisSettings,
    name: str = "alice",
    expert: str = EXPERT,
    *,
    trainer: Resumes | None = None,
    state_dir: StateDir | None = None,
    identity: BaseIdentity = IDENTITY,
    training_fields: Callable[[], Fields] = dict,
    checkpoint_interval_s: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
) -> Membership:
    """A worker that has begun, all but its thread, beside a training that counts (or another one); claims no name."""
    member = Membership(
        redis, expert, name, state_dir=state_dir, wait=False, checkpoint_interval_s=checkpoint_interval_s
    )
    member.spec, member.identity = member.store.spec(), identity  # its rights are not looked at
    trainer = trainer or Counter(torch.zeros(member.spec.layout.numel))
    member.begin(trainer, data="d", training_fields=training_fields, clock=clock)
    return member


class CountingWorker:
    """The real sync in one thread, beside a training in another that counts; a context manager."""

    def __init__(
        self, connection: Connection, spec: Spec, name: str = "alice", *, step_s: float = 0.002
    ) -> None:
        self.name = name
        self.steps = 0
        self.trainer = Counter(torch.zeros(spec.layout.numel))
        member = join(connection.settings, name, trainer=self.trainer)
        self.exchange, self.sync, self._syncing = member.exchange, member.sync, member.thread
        self._step_s = step_s
        self._enough = threading.Event()
        self._training = threading.Thread(target=self._train, daemon=True)

    def _train(self) -> None:
        while self._syncing.is_alive():
            self.exchange.boundary()
            time.sleep(self._step_s)
            if not self._enough.is_set():
                self.exchange.record(self.trainer.step())
                self.steps += 1
        self.exchange.boundary()

    def __enter__(self) -> Self:
        self._syncing.start()
        self._training.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.finish(0.0)

    def finish(self, drain_s: float = 15.0) -> None:
        """Train no more, publish what is trained, wait for the decision."""
        self._enough.set()
        if self._syncing.is_alive():
            self.sync.finish(drain_s)
        self._training.join()


def assert_settled(
    connection: Connection,
    spec: Spec,
    workers: Sequence[CountingWorker],
    archive: Path,
    *,
    leftovers: int = 0,
) -> None:
    """Every step of every (finished) worker is in the expert exactly once, and nothing waits.

    `leftovers` is the number of payload keys that may be left, which nobody will ever read again and which expire.
    """
    meta, weights, lines = GatewayStore(connection).history(EXPERT)
    total = 0
    for worker in workers:
        assert worker.sync.failure is None
        assert worker.sync.ledger.queue == []
        assert worker.exchange.steps_left == 0
        mine = [(line["run"], int(line["seq"])) for line in lines if line["worker"] == worker.name]
        ledger = worker.sync.ledger
        assert mine == [(ledger.run, seq) for seq in range(1, ledger.seq + 1)]
        assert torch.equal(worker.trainer.flat, ledger.base)  # nothing pending, no progress
        total += worker.steps
    assert (meta.n_examples, meta.refused) == (total, 0)
    assert torch.equal(values_of(spec.layout, weights), torch.full((spec.layout.numel,), float(total)))
    done = replay(spec, meta, lines, Archive(archive / EXPERT))
    assert done.problem == ""
    assert done.weights.same_values(weights)
    newest = [worker for worker in workers if worker.sync.ledger.meta.version == meta.version]
    assert newest
    assert all(torch.equal(worker.trainer.flat, values_of(spec.layout, weights)) for worker in newest)
    keys = connection.keys.expert(EXPERT)
    assert connection.client.xlen(keys.updates) == 0
    assert connection.client.xpending(keys.updates, GROUP)["pending"] == 0
    own = {
        key.encode() for worker in workers for key in (keys.incarnation(worker.name), keys.trace(worker.name))
    }
    left = set(connection.client.scan_iter("*:payload:*")) - own
    assert len(left) in (0, leftovers), left
    assert all(connection.client.ttl(key) > 0 for key in left)
