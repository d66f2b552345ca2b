"""Workers and aggregators of different protocols: each says which side to upgrade, and nothing trained is lost."""

import json
import logging
import re
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import msgpack
import pytest
import torch

from consumers.create import SpecRequest, ensure_experts
from consumers.expert import Expert
from consumers.gateway.builder import GatewayBuilder
from fedmoe.errors import ProtocolError
from fedmoe.protocol import features, records
from fedmoe.protocol.beat import Beat
from fedmoe.protocol.codec import cut
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.rules import RuleSet
from fedmoe.settings import GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.store.inspect import Inspector
from fedmoe.store.lease import Lease
from fedmoe.store.worker import WorkerStore
from fedmoe.util.software import software
from producers.checkpoint import StateDir
from producers.heartbeat import Heartbeat, SyncStatus
from producers.join import Joining
from producers.ledger import Trained
from tests.counting import Counter, join
from tests.errors import raises
from tests.federation import FINGERPRINT, LAYOUT, ScriptedWorker, make_expert, serve, serving, small_spec
from tests.processes import eventually

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]
SPEC = small_spec()
RULES = RuleSet(sync_interval_s=0.05)


@pytest.fixture
def expert(connection: Connection) -> Expert:
    return make_expert(connection, spec=SPEC, rules=RULES)


def raise_protocol(expert: Expert) -> None:
    """As a later FedMoE's aggregator does it: in a commit."""
    expert.store.connection.client.hset(
        expert.store.keys.meta, mapping={"protocol": records.PROTOCOL + 1, "commit": "later", "seats": "4"}
    )


def require_signing(expert: Expert) -> None:
    """As an aggregator of a later release and the same protocol does it."""
    expert.store.connection.client.hset(
        expert.store.keys.meta, mapping={"requires": "signing", "commit": "later"}
    )


def require_signing_in_spec(expert: Expert) -> None:
    """The same, for whoever trains or serves the expert at all."""
    content = json.loads(expert.spec.to_json()) | {"requires": "signing"}
    expert.store.connection.client.set(expert.store.keys.spec, json.dumps(content))


LATER = [raise_protocol, require_signing, require_signing_in_spec]


# ---- the aggregator ----


@pytest.mark.parametrize(("form", "who"), [(2, "the aggregator's"), (0, "the worker's")])
def test_header_of_another_format_is_undecidable_and_said_once(
    expert: Expert, connection: Connection, caplog: pytest.LogCaptureFixture, form: int, who: str
) -> None:
    """However often its worker sends it; it is no dead letter, and with the right header it counts."""
    worker = ScriptedWorker(connection, SPEC)
    update = worker.push(1.0)
    head = expert.store.keys.header("alice", update.id.run, 1)
    foreign = msgpack.unpackb(update.header.pack()) | {"header_format": form, "seats": 4}
    for _ in range(3):
        connection.client.set(head, msgpack.packb(foreign))
        assert serve(expert) == ["undecidable"]
        worker.publish(update)
    assert connection.client.xlen(expert.store.keys.dead) == 0
    (record,) = caplog.records
    assert record.getMessage() == (
        f"sql_expert: updates of worker alice cannot be read: its header has format {form}, the aggregator reads "
        f"format 1: upgrade {who} FedMoE"
    )
    assert serve(expert) == ["applied"]
    assert (expert.meta.undecidable, expert.meta.garbage, expert.meta.refused) == (3, 0, 0)


@pytest.mark.parametrize(
    ("named", "who"),
    [(str(records.PROTOCOL + 1), "this aggregator"), ("0", "that worker"), ("x" * 999, "that worker")],
)
def test_joining_worker_of_another_protocol_pins_nothing_and_is_said_once(
    connection: Connection, caplog: pytest.LogCaptureFixture, named: str, who: str
) -> None:
    """What its heartbeat says may mean something else."""
    expert = make_expert(connection, base_fingerprint="")
    worker = ScriptedWorker(connection, expert.spec)
    for _ in range(2):
        worker.store.beat(Beat(base_fingerprint="abcdef", protocol=named), ttl_s=5)
        worker.store.join()
        serve(expert)
    assert expert.meta.base_fingerprint == ""
    (record,) = caplog.records
    assert record.getMessage() == (
        f"sql_expert: worker alice speaks protocol {named[:20]} and this aggregator protocol {records.PROTOCOL}: "
        f"upgrade the FedMoE of {who}"
    )


def test_warnings_that_are_said_once_are_bounded(connection: Connection, expert: Expert) -> None:
    """Whoever may write under any name cannot make memory grow."""
    for number in range(1000):
        expert.warn_once(f"worker {number}")
    assert len(expert.warned) < 300


@pytest.mark.parametrize("raises", LATER)
def test_aggregator_does_not_serve_an_expert_of_a_later_release(
    expert: Expert,
    connection: Connection,
    connect: Connect,
    caplog: pytest.LogCaptureFixture,
    raises: Callable[[Expert], None],
) -> None:
    """A rolling upgrade: it changes nothing more, says what to upgrade, and leaves the lease to whoever can serve."""
    keys = expert.store.keys
    with caplog.at_level(logging.WARNING), serving(connect(), lease_s=0.4):
        eventually("the lease", lambda: connection.client.get(keys.lease))
        raises(expert)
        connection.client.hset(keys.meta, mapping={"commit": "later", "seats": "4"})
        connection.client.xadd(keys.updates, {"hello": "world"})
        eventually("the sentence", lambda: "upgrade the FedMoE on this machine" in caplog.text)
        other = Lease(connect(), keys.lease, holder="later", ttl_ms=5000)
        eventually("the lease for another", other.hold)
    meta = connection.client.hgetall(keys.meta)
    assert (meta[b"commit"], meta[b"seats"], connection.client.xlen(keys.updates)) == (b"later", b"4", 1)


def test_aggregator_of_a_later_protocol_raises_the_experts(
    expert: Expert, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, in a commit of its own: workers are told although there is no update to decide."""
    before = expert.store.load().meta
    later = records.PROTOCOL + 1
    monkeypatch.setattr(records, "PROTOCOL", later)
    with serving(connect()):
        eventually("the later protocol", lambda: expert.store.load().meta.protocol == later)
    after = expert.store.load().meta
    assert after.commit != before.commit
    assert (after.version, after.weights_commit) == (before.version, before.weights_commit)


@pytest.mark.parametrize("raises", LATER)
def test_aggregator_starts_with_no_expert_of_a_later_protocol(
    expert: Expert, connection: Connection, raises: Callable[[Expert], None]
) -> None:
    """Its start fails, with the exit code of an error that trying again does not change."""
    raises(expert)
    with pytest.raises(ProtocolError, match="upgrade the FedMoE on this machine") as error:
        ensure_experts(connection, {"sql_expert": 1.0}, SpecRequest())
    assert error.value.exit_code == 2


def test_gateway_that_needs_more_is_left_to_whoever_knows_it(
    expert: Expert, connection: Connection, connect: Connect
) -> None:
    """Its lease is given up, and the sentence stands under this aggregator's name, not in the gateway's meta."""
    keys = connection.keys.merged
    builder = GatewayBuilder(connect(), GatewaySettings(interval_s=0.1), holder="old", lease_s=0.5)
    assert builder.refresh()
    connection.client.hset(keys.meta, "requires", "signing")
    stop = threading.Event()
    thread = threading.Thread(target=builder.run, args=(stop,))
    thread.start()
    try:
        eventually("the sentence", lambda: b"needs signing" in connection.client.hget(keys.problem, "old"))
        other = Lease(connect(), keys.lease, holder="later", ttl_ms=5000)
        eventually("the lease for another", other.hold)
    finally:
        stop.set()
        thread.join()
    assert connection.client.hget(keys.meta, "error") is None


# ---- what one side must know, within a protocol ----


def test_update_that_needs_more_waits_until_its_aggregators_know_it(
    expert: Expert, connection: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Undecidable until then; its worker is told at its next look, and goes on after the upgrade."""
    worker = ScriptedWorker(connection, SPEC)
    monkeypatch.setattr(features, "UPDATES_REQUIRE", "signing")
    update = worker.push(1.0)
    assert serve(expert) == ["undecidable"]
    for look in (worker.store.meta, lambda: worker.store.poll("0-1", update.header), worker.pull):
        with raises(ProtocolError, about="requires"):
            look()
    monkeypatch.setattr(features, "FEATURES", frozenset({"signing", features.QUICK_DIGESTS}))
    with serving(connect()):
        eventually("an aggregator that knows it", lambda: "signing" in expert.store.load().meta.knows)
        worker.publish(update)
        eventually("version 1", lambda: expert.store.load().meta.version == 1)
    assert worker.pull().decided == (update.id,)


def test_who_runs_on_what_is_told(expert: Expert, connection: Connection, connect: Connect) -> None:
    """In the expert's meta, in the heartbeat and where a worker joins."""
    worker = ScriptedWorker(connection, SPEC)
    worker.store.join()
    ((_, entry),) = connection.client.xrange(expert.store.keys.updates)
    assert entry[b"software"].decode() == software()
    assert re.fullmatch(r"fedmoe \S+, torch \S+, transformers \S+, peft \S+", software())
    serve(expert)
    assert expert.store.load().meta.software == software()
    heart = Heartbeat(
        worker.store, BaseIdentity(fingerprint="f"), state_id="", training_fields=dict, clock=lambda: 1.0
    )
    heart.beat(worker.ledger, SyncStatus())
    (view,) = Inspector(connection).federation().workers
    assert view.software == software()


# ---- the worker ----


def test_worker_does_not_join_an_expert_of_another_protocol(
    expert: Expert, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says before it loads a base model which side to upgrade."""
    joining = Joining(WorkerStore(connection, "sql_expert", "alice"), wait=True, stop=threading.Event())
    assert joining.meta().spec == SPEC.digest
    ours = records.PROTOCOL
    monkeypatch.setattr(records, "PROTOCOL", ours + 1)
    with pytest.raises(
        ProtocolError,
        match=rf"'sql_expert' speak protocol {ours} and this worker protocol {ours + 1}: upgrade .* agg",
    ):
        joining.meta()
    monkeypatch.setattr(records, "PROTOCOL", ours)
    raise_protocol(expert)
    with raises(ProtocolError, about="protocol"):
        joining.meta()


class Run:
    """A worker's sync in a thread beside a training that counts."""

    def __init__(
        self,
        connection: Connection,
        state_dir: StateDir | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.trainer = Counter(torch.zeros(SPEC.layout.numel))
        member = join(connection.settings, trainer=self.trainer, state_dir=state_dir, clock=clock)
        self.exchange, self.sync = member.exchange, member.sync

    def go_until(self, done: Callable[[], object], *, trains: bool = True) -> None:
        """Pass step boundaries, with or without training between them."""
        until = time.monotonic() + 60
        while not done() and time.monotonic() < until:
            self.exchange.boundary()
            if trains:
                self.exchange.take_step(self.trainer.step)
            time.sleep(0.002)
        assert done()


@pytest.mark.parametrize("raises", [raise_protocol, require_signing])
@pytest.mark.parametrize("trains", [True, False])
def test_worker_ends_and_keeps_all_when_the_protocol_is_raised(
    expert: Expert,
    connection: Connection,
    connect: Connect,
    tmp_path: Path,
    trains: bool,
    raises: Callable[[Expert], None],
) -> None:
    """A poll sees it while an update waits, and else a pull; the checkpoint holds every step."""
    state_dir = StateDir(tmp_path)
    run = Run(connect(), state_dir)
    thread = threading.Thread(target=run.sync.run, daemon=True)
    thread.start()
    if trains:
        run.go_until(lambda: connection.client.xlen(expert.store.keys.updates))
    raises(expert)
    run.go_until(lambda: not thread.is_alive(), trains=trains)
    assert isinstance(run.sync.failure, ProtocolError)
    assert run.sync.saved
    saved = state_dir.load(expert="sql_expert", worker="alice", spec=SPEC, now=0.0)
    assert saved is not None
    trained = saved.ledger.progress(saved.local) + saved.ledger.pending()
    assert float(trained.mean()) == saved.position
    assert bool(saved.position) == trains


def test_undecided_update_is_sent_again_more_and_more_seldom(expert: Expert, connection: Connection) -> None:
    """While the worker is about to end, too: an aggregator that cannot read it is not flooded."""
    now = 0.0
    run = Run(connection, clock=lambda: now)
    run.sync.ledger.make_update(
        cut(torch.ones(LAYOUT.numel), "fp32"), Trained(steps=1), fingerprint=FINGERPRINT
    )
    run.sync.finish(1000.0)
    sent = []
    while now < 60:
        before = run.sync.status.published
        run.sync.attempt()
        if run.sync.status.published > before:
            sent.append(now)
            connection.client.delete(expert.store.keys.header("alice", run.sync.ledger.run, 1))
            assert serve(expert) == ["undecidable"]
        now += 0.05  # what the thread waits at most while it is about to end
    assert sent[1] - sent[0] < 0.2
    assert 10 < len(sent) < 25
    assert max(b - a for a, b in pairwise(sent)) < 5.5
    assert run.sync.status.undecided >= len(sent) - 1
