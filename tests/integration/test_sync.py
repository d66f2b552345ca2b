"""The sync thread beside a training that only counts: nothing trained is lost, whatever happens in between."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from consumers.expert import Expert
from fedmoe.errors import RefusedError
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.rules import AggregationRules, RuleSet
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.validation import Measured
from fedmoe.store.connection import Connection
from producers import heartbeat
from producers.checkpoint import StateDir
from producers.spares import Spares
from tests.counting import Counter, join
from tests.federation import FINGERPRINT, LAYOUT, ScriptedWorker, make_expert, serve, serving, small_spec
from tests.processes import eventually
from tests.rollback import Snapshot

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]
SPEC = small_spec()
RULES = RuleSet(aggregation=AggregationRules(max_norm=1e4), sync_interval_s=0.1)
STRICT = replace(RULES, aggregation=replace(RULES.aggregation, max_staleness=2))


class Run:
    """A worker's two threads; this one is the training."""

    def __init__(
        self,
        connection: Connection,
        state_dir: StateDir | None = None,
        *,
        name: str = "alice",
        tokenizer: str = "",
        spec: Spec = SPEC,
    ) -> None:
        self.trainer = Counter(torch.zeros(spec.layout.numel))
        member = join(
            connection.settings, name, trainer=self.trainer, state_dir=state_dir,
            identity=BaseIdentity(fingerprint=FINGERPRINT, tokenizer=tokenizer),
        )  # fmt: skip
        self.exchange, self.sync, self.thread = member.exchange, member.sync, member.thread
        self.thread.start()
        self.steps = 0

    def train(self, steps: int, step_s: float = 0.005) -> None:
        for _ in range(steps):
            self.exchange.boundary()
            step = self.trainer.step()
            time.sleep(step_s)
            self.exchange.record(step)
            self.steps += 1

    def finish(self, drain_s: float) -> None:
        self.sync.finish(drain_s)
        while self.thread.is_alive():
            self.exchange.boundary()
            self.thread.join(0.01)


@pytest.fixture
def expert(connection: Connection) -> Expert:
    return make_expert(connection, spec=SPEC, rules=RULES)


def test_every_step_arrives_once(expert: Expert, connect: Connect) -> None:
    """Alone on its stream, with an aggregator that comes late and goes early: the expert counts every step."""
    run = Run(connect())
    run.train(60)
    with serving(connect(), block_ms=20):
        run.train(100)
    run.train(60)
    with serving(connect(), block_ms=20):
        run.finish(10.0)
    assert run.sync.failure is None
    meta = expert.store.load().meta
    assert meta.n_examples == run.steps
    expert.load()
    assert torch.equal(expert.buffer.flat, torch.arange(LAYOUT.numel) + float(run.steps))
    assert run.exchange.steps_left == 0


def test_what_is_sent_again_is_not_too_far_ahead(
    connection: Connection, expert: Expert, connect: Connect
) -> None:
    """Redis went back, nobody remembers, another worker's updates are lost: one's own count again, each once."""
    connection.client.flushdb()
    expert = make_expert(connection, spec=SPEC, rules=STRICT)
    snapshot = Snapshot.take(connection)
    gone, run = ScriptedWorker(connection, SPEC, "gone"), Run(connect())
    with serving(connect(), block_ms=20):
        for version in range(1, 7):
            gone.push(0.0)
            eventually("an update", lambda v=version: expert.store.load().meta.version >= v)
            gone.pull()
        while run.sync.status.applied < 3:
            run.train(1)
    snapshot.bring_back(connection)
    with serving(connect(), block_ms=20):
        run.train(20)
        run.finish(10.0)
    meta = expert.store.load().meta
    assert (meta.refused, meta.n_examples) == (0, run.steps)


def test_update_whose_base_is_undone_is_sent_again_from_the_version_there_is(
    connection: Connection, connect: Connect
) -> None:
    """Redis went back over another worker's updates while this one's first waited: its own books did not move."""
    expert = make_expert(connection, spec=SPEC, rules=STRICT)
    bob = ScriptedWorker(connection, SPEC, "bob")
    snapshot = Snapshot.take(connection)
    for _ in range(6):
        bob.push(0.0)
        assert serve(expert) == ["applied"]
        bob.pull()
    run = Run(connect())
    eventually("an update", lambda: run.train(1) or run.sync.status.published)
    snapshot.bring_back(connection)
    with serving(connect(), block_ms=20):
        run.finish(10.0)
    meta = expert.store.load().meta
    assert (meta.refused, meta.n_examples) == (0, run.steps)


def test_diverged_training_goes_back_to_the_expert(
    expert: Expert, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """Infinity in the adapter is never published and does not stay: what comes after it counts."""
    run = Run(connect())
    with serving(connect(), block_ms=20):
        run.train(60)
        run.trainer.flat += float("inf")
        run.train(100)
        run.finish(10.0)
    assert torch.isfinite(run.trainer.flat).all()
    meta = expert.store.load().meta
    assert meta.refused == 0
    expert.load()
    assert torch.isfinite(expert.buffer.flat).all()
    assert meta.n_examples > 60 * 0.5
    assert "the training of expert 'sql_expert' diverged: " in caplog.text


@pytest.mark.parametrize("size", [12, 40])
def test_worker_of_an_expert_made_anew_with_another_spec_stops(
    expert: Expert, connect: Connect, size: int
) -> None:
    """Of another shape, too: it says that it has to be started again, and does not try for ever."""
    run = Run(connect())
    run.train(20)
    client = expert.store.connection.client
    client.flushall()
    other = small_spec(layout=Layout.of([("x", (size,))]), wire_format="int8")
    make_expert(connect(), spec=other)
    run.finish(10.0)
    assert isinstance(run.sync.failure, RefusedError)
    assert "restart this worker" in str(run.sync.failure)


def test_worker_with_another_tokenizer_stops(expert: Expert, connect: Connect) -> None:
    """Two that joined while no aggregator was there: the first one's is pinned, the other is refused, and told."""
    runs = [Run(connect(), name=name, tokenizer=f"added:{name[0]}") for name in ("alice", "bob")]
    for run in runs:
        eventually("an update", lambda run=run: run.train(1) or run.sync.status.published)
    assert serve(expert) == ["applied", "refused"]
    for run in runs:
        run.finish(10.0 if run is runs[1] else 0.1)
    assert isinstance(runs[1].sync.failure, RefusedError)
    assert "differs from the expert's (set by worker alice) in added tokens" in str(runs[1].sync.failure)
    assert expert.meta.tokenizer == "added:a"


def test_heartbeat_goes_on_during_long_steps(
    expert: Expert, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step longer than the heartbeat's life: the worker does not look dead."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_INTERVAL_S", 0.2)
    monkeypatch.setattr(heartbeat, "HEARTBEAT_TTL_S", 0.8)
    run = Run(connect())
    key = expert.store.keys.worker("alice")
    eventually("the first beat", lambda: expert.store.connection.client.exists(key))
    gone = 0
    training = threading.Thread(target=run.train, args=(1, 2.5))
    training.start()
    while training.is_alive():
        gone += not expert.store.connection.client.exists(key)
        time.sleep(0.02)
    run.finish(0.0)
    assert gone == 0


def test_steps_that_nobody_took_are_counted_as_left(expert: Expert, connect: Connect) -> None:
    """A drain too short even for the copy: the worker must know that these steps are lost."""
    run = Run(connect())
    run.train(10, 0.0)
    run.finish(0.0)
    run.exchange.boundary()
    taken = sum(update.header.steps for update in run.sync.ledger.queue)
    assert taken + run.exchange.steps_left == 10


def test_broken_record_in_redis_is_waited_out(expert: Expert, connect: Connect, tmp_path: Path) -> None:
    """Somebody overwrites a field of `decided`: training goes on, and so does the sync once it is mended."""
    run = Run(connect(), StateDir(tmp_path))
    redis, key = expert.store.connection.client, expert.store.keys.decided
    with serving(connect(), block_ms=20):
        run.train(60)
        eventually("a decision", lambda: redis.hget(key, "alice"))
    good = redis.hget(key, "alice")
    redis.hset(key, "alice", "oops")
    run.train(80)
    assert "malformed" in run.sync.status.problem
    redis.hset(key, "alice", good)
    with serving(connect(), block_ms=20):
        run.finish(15.0)
    assert run.sync.failure is None
    assert expert.store.load().meta.n_examples == run.steps


def test_checkpoint_directory_that_vanishes_is_made_again(
    expert: Expert, connect: Connect, tmp_path: Path
) -> None:
    """Somebody tidied up: the next checkpoint is there, and publishing goes on."""
    state = StateDir(tmp_path / "state")
    run = Run(connect(), state)
    with serving(connect(), block_ms=20):
        run.train(40)
        state.path.rename(tmp_path / "gone")  # at once: a checkpoint may be written just now
        run.train(80)
        run.finish(10.0)
    saved = state.load(expert="sql_expert", worker="alice", spec=SPEC, now=0.0)
    assert saved is not None
    assert saved.position == run.steps


def test_a_step_that_does_not_end_costs_only_itself(expert: Expert, connect: Connect, tmp_path: Path) -> None:
    """The training comes to no boundary any more: all whole steps are on disk, the step under way is never applied."""
    state = StateDir(tmp_path / "state")
    run = Run(connect(), state)
    run.train(10)
    run.sync.finish(0.2)
    run.thread.join(20)
    assert not run.thread.is_alive()
    assert run.sync.saved
    assert run.exchange.take_step(run.trainer.step) is None
    saved = state.load(expert="sql_expert", worker="alice", spec=SPEC, now=0.0)
    assert saved is not None
    assert saved.position == 10
    assert saved.trained.steps + sum(update.header.steps for update in saved.ledger.queue) == 10
    assert torch.equal(saved.local, torch.arange(LAYOUT.numel) + 10.0)


@pytest.mark.parametrize("with_disk", [False, True])
def test_memory_is_used_again(
    expert: Expert, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_disk: bool
) -> None:
    """However many updates a worker makes, it needs memory for few vectors of its adapter's size."""
    made: list[torch.Tensor] = []  # kept, so that no two have the same address
    take = Spares.take

    def counted(self: Spares) -> torch.Tensor:
        vector = take(self)
        made.append(vector)
        return vector

    monkeypatch.setattr(Spares, "take", counted)
    run = Run(connect(), StateDir(tmp_path) if with_disk else None)
    with serving(connect(), block_ms=20):
        while run.sync.status.applied < 10:
            run.train(1)
        run.finish(10.0)
    assert run.sync.failure is None
    assert len(made) > 20
    assert len({vector.data_ptr() for vector in made}) <= 4


def test_loss_of_the_expert_before_it_was_made_anew_is_not_published(
    expert: Expert, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """The aggregator would blame an honest worker, until the new expert has that version."""
    store, worker = expert.store, join(connect().settings)
    ScriptedWorker(connect(), SPEC, "bob").push(0.5)
    serve(expert)
    worker.exchange.want_base()
    worker.sync._pull()
    version, _ = worker.exchange.take_base() or (0, None)
    assert version == 1
    measured = Measured(loss=1.5, version=version, rows=9)
    worker.exchange.publish(measured)
    client = store.connection.client
    client.delete(*client.keys("fedmoe:{sql_expert}:*"))
    again = make_expert(store.connection)
    worker.sync._pull()
    assert worker.exchange.take_measured() is None
    worker.exchange.publish(measured)  # a measurement that has only ended now
    worker.exchange.boundary()
    worker.exchange.record(Counter(torch.zeros(2)).step())
    worker.sync.finish(0.0)
    for _ in range(3):
        worker.sync.attempt()
        worker.exchange.boundary()
    serve(again)
    assert again.meta.version == 1
    assert "claims" not in caplog.text
