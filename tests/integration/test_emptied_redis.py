"""Redis comes back empty: whoever holds an expert writes it back; if nobody does, all wait for an operator."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from consumers.aggregator import ExpertServer
from consumers.create import SpecRequest, ensure_experts
from consumers.daemon import Aggregator
from consumers.expert import Expert
from consumers.gateway.builder import GatewayBuilder
from consumers.recovery.creation import without_lost, without_trained
from consumers.recovery.write_back import write_back
from consumers.verify import replay
from fedmoe.errors import LostExpertError, RedisUnavailableError
from fedmoe.protocol.beat import Beat
from fedmoe.protocol.federation import findings
from fedmoe.protocol.layout import AdapterBuffer, stamped
from fedmoe.protocol.lora import LoraSettings
from fedmoe.settings import AggregatorSettings, GatewaySettings, RedisSettings
from fedmoe.store.archive import Archive
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.inspect import Inspector
from fedmoe.store.worker import WorkerStore
from tests.errors import raises
from tests.federation import LAYOUT, ScriptedWorker, make_expert, serve, serving
from tests.processes import eventually, running

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]


@pytest.fixture(autouse=True)
def _short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one aggregator, nobody else has to be waited for."""
    monkeypatch.setattr("consumers.recovery.settle.CLAIM_WAIT_S", 0.2)


def weights_of(expert: Expert) -> torch.Tensor:
    """The weights as Redis holds them."""
    buffer = AdapterBuffer(expert.spec.layout)
    buffer.load(expert.store.load().weights)
    return buffer.flat


def test_expert_is_written_back_whole(connection: Connection, connect: Connect) -> None:
    """Same lineage, spec and decisions, a new commit id; workers go on as if nothing had been."""
    expert = make_expert(connection)
    alice, bob = (ScriptedWorker(connection, expert.spec, name) for name in ("alice", "bob"))
    with serving(connect(), "one"):
        alice.push(1.0)
        eventually("version 1", lambda: expert.store.load().meta.version == 1)
        bob.push(2.0)  # decided, and bob does not know yet
        eventually("version 2", lambda: expert.store.load().meta.version == 2)
        before, weights = expert.store.load(), weights_of(expert)
        connection.client.flushall()
        eventually("the expert", expert.store.exists, timeout_s=5)
        after = expert.store.load()
        assert torch.equal(weights_of(expert), weights)
        assert after.decided == before.decided
        assert after.meta.commit not in (before.meta.commit, "")
        unlike = {"commit", "weights_commit", "digests", "updated_at"}  # the digests name the weights commit
        for field in before.meta.__dataclass_fields__.keys() - unlike:
            assert getattr(after.meta, field) == getattr(before.meta, field), field
        assert expert.store.spec() == expert.spec
        for worker in (alice, bob):
            assert not worker.pull().resent
            worker.push(1.0)
        eventually("version 4", lambda: expert.store.load().meta.version == 4)


def test_what_was_on_its_way_is_sent_again(connection: Connection, connect: Connect) -> None:
    """An undecided update goes down with the server, and counts once all the same."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    with serving(connect(), "one") as (server, _):
        eventually("the expert in memory", lambda: server.is_serving)
        worker.train(1.0)
        update = worker.make_update()
        connection.client.flushall()
        eventually("the expert", expert.store.exists, timeout_s=5)
        assert not worker.store.poll("0-1", update.header).entry_waits
        worker.publish()
        eventually("version 1", lambda: expert.store.load().meta.version == 1)
    worker.pull()
    assert torch.equal(worker.local, torch.arange(LAYOUT.numel) + 1.0)


def test_batch_that_was_not_committed_is_not_written_back(connection: Connection) -> None:
    """It was folded when the server lost everything: what comes back is the state before, and it is decided once."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    worker.push(1.0)
    entries = expert.store.read(block_ms=1, count=10)
    commit = expert.store.commit

    def emptied(what: object) -> None:
        connection.client.flushall()
        commit(what)

    expert.store.commit = emptied
    with pytest.raises(RuntimeError):
        expert.process(entries)
    assert write_back(expert, on="")
    assert torch.equal(weights_of(expert), torch.arange(LAYOUT.numel) * 1.0)
    assert not worker.pull().decided
    expert.store.commit = commit
    expert.load()
    worker.publish()
    assert serve(expert) == ["applied"]
    worker.pull()
    assert torch.equal(weights_of(expert), worker.local)


def test_nothing_is_overwritten(connection: Connection, connect: Connect) -> None:
    """Only on top of what was looked at: an expert that is there by then stays as it is."""
    expert = make_expert(connection)
    client, keys = connection.client, expert.store.keys
    assert not write_back(expert, on="")
    client.delete(keys.meta)
    weights = client.get(keys.weights)
    assert not write_back(expert, on=expert.meta.commit)
    assert client.get(keys.weights) == weights
    assert not expert.store.exists()
    assert write_back(expert, on="")
    assert expert.store.condition().damage == ""


def test_rest_of_another_history_is_not_overwritten(
    connection: Connection, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights without meta, of a commit that this memory never saw: an operator decides."""
    expert = make_expert(connection)
    client, keys = connection.client, expert.store.keys
    weights = stamped(client.get(keys.weights), "of-somebody-else")
    client.set(keys.weights, weights)
    client.delete(keys.meta)
    server = ExpertServer(connect(), "sql_expert", AggregatorSettings(), holder="one", retained=expert)
    with caplog.at_level("WARNING"):
        server.run(StoppedAfter(10))
    assert "this aggregator retains another history in memory" in caplog.text
    assert "fedmoe restore --replace" in caplog.text
    assert client.get(keys.weights) == weights
    assert server.retained is expert


class StoppedAfter(threading.Event):
    """Set after so many looks."""

    def __init__(self, turns: int) -> None:
        super().__init__()
        self._turns = turns

    def is_set(self) -> bool:
        self._turns -= 1
        return self._turns < 0

    def wait(self, timeout: float | None = None) -> bool:
        time.sleep(timeout or 0.0)
        return False


def test_of_two_aggregators_one_writes_back(connection: Connection, connect: Connect) -> None:
    """A standby remembers nothing, and takes the lease of the emptied server: the other one writes back still."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    with serving(connect(), "one") as (one, _), serving(connect(), "two") as (two, _):
        worker.push(1.0)
        eventually("version 1", lambda: expert.store.load().meta.version == 1)
        serving_now = eventually("one that serves", lambda: [s for s in (one, two) if s.is_serving])
        assert len(serving_now) == 1
        eventually("a standby without memory", lambda: [s for s in (one, two) if s.retained is None])
        holder = connection.client.get(expert.store.keys.lease).decode()
        pipe = connection.client.pipeline(transaction=True)
        pipe.flushall()
        pipe.set(expert.store.keys.lease, "two" if holder == "one" else "one", px=1000)
        pipe.execute()
        eventually("the expert", expert.store.exists, timeout_s=5)
        assert expert.store.load().meta.version == 1
        worker.pull()
        worker.push(1.0)
        eventually("version 2", lambda: expert.store.load().meta.version == 2)


def test_who_remembers_most_writes_back(
    connection: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was cut off long ago and one that served until the end: the old memory does not win."""
    monkeypatch.setattr("consumers.recovery.settle.CLAIM_WAIT_S", 2.0)
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    old = Expert(ExpertStore(connect(), "sql_expert"), expert.spec, aggregator="z-old")
    old.load()
    for _ in range(3):
        worker.push(1.0)
        serve(expert)
        worker.pull()
    connection.client.flushall()
    stop = threading.Event()
    threads = []
    for memory, holder in ((old, "z-old"), (expert, "a-new")):
        server = ExpertServer(
            connect(),
            "sql_expert",
            AggregatorSettings(lease_s=1.0, block_ms=50),
            holder=holder,
            retained=memory,
        )
        threads.append(threading.Thread(target=server.run, args=(stop,)))
    for thread in threads:
        thread.start()
        time.sleep(0.5)  # the old one speaks first
    try:
        eventually("the expert", expert.store.exists, timeout_s=8)
        assert worker.store.meta().version == 3
        assert not connection.client.exists(expert.store.keys.claims)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_memory_of_one_who_no_longer_serves_is_not_written_back(
    connection: Connection, connect: Connect
) -> None:
    """A standby that served before forgets, so that no old version comes back."""
    expert = make_expert(connection)
    with serving(connect(), "one") as (one, _):
        eventually("the expert in memory", lambda: one.retained is not None)
        connection.client.set(expert.store.keys.lease, "two", px=60_000)
        eventually("it forgot", lambda: one.retained is None)
        connection.client.delete(expert.store.keys.meta, expert.store.keys.weights)
    assert not expert.store.exists()


def test_replay_goes_on_from_what_was_written_back(
    connection: Connection, connect: Connect, tmp_path: Path
) -> None:
    """With the updates kept, the weights are too: the log is gone, and yet what comes after can be recomputed."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    with serving(connect(), "one", keep_updates=tmp_path):
        worker.push(1.0)
        eventually("version 1", lambda: expert.store.load().meta.version == 1)
        connection.client.flushall()
        eventually("the expert", expert.store.exists, timeout_s=5)
        worker.pull()
        worker.push(0.3)
        eventually("version 2", lambda: expert.store.load().meta.version == 2)
    meta, weights, lines = GatewayStore(connection).history("sql_expert")
    done = replay(expert.spec, meta, lines, Archive(tmp_path / "sql_expert"))
    assert (done.problem, done.since, done.version) == ("", 1, 2)
    assert done.weights.same_values(weights)


def test_whole_daemon_writes_back_experts_and_gateway(
    connection: Connection, connect: Connect, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Every expert, their list with the gateway weights, and the gateway."""
    for name, weight in (("a", 2.0), ("b", 1.0)):
        make_expert(connection, name).store.register(weight, overwrite=True)
    daemon = Aggregator(
        RedisSettings(url=redis_url), ["a", "b"], AggregatorSettings(block_ms=50, lease_s=1.0),
        GatewaySettings(interval_s=0.1), holder="one",
    )  # fmt: skip
    stop = threading.Event()
    thread = threading.Thread(target=daemon.run, args=(stop,))
    caplog.set_level(logging.INFO)
    thread.start()
    store = GatewayStore(connect())
    try:
        eventually("a gateway", store.load_merged)
        eventually("both experts in memory", lambda: caplog.text.count(": serving from version") == 2)
        connection.client.flushall()
        eventually("the list", lambda: store.experts() == {"a": 2.0, "b": 1.0}, timeout_s=10)
        eventually("the gateway", store.load_merged, timeout_s=10)
    finally:
        stop.set()
        thread.join()


def test_list_of_experts_comes_back_whole(connection: Connection, connect: Connect) -> None:
    """The gateway looks when only one of two was written back: the other one is listed when it is there."""
    a, b = make_expert(connection, "a"), make_expert(connection, "b")
    builder = GatewayBuilder(connect(), GatewaySettings(), holder="one", lease_s=1.0)
    builder.refresh()
    connection.client.flushall()
    assert write_back(a, on="")
    builder.refresh()
    assert set(GatewayStore(connection).experts()) == {"a"}
    assert write_back(b, on="")
    builder.refresh()
    assert set(GatewayStore(connection).experts()) == {"a", "b"}


def test_nobody_left_means_that_all_wait(connection: Connection, connect: Connect) -> None:
    """An aggregator that remembers nothing invents nothing, and says what an operator can do; so does a worker."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    connection.client.flushall()
    with pytest.raises(LostExpertError, match=r"fedmoe restore.*--new-lineage"):
        worker.pull()
    with raises(LostExpertError, about="sql_expert"):
        expert.load()
    with serving(connect(), "one"):
        eventually("the lease", lambda: connection.client.get(expert.store.keys.lease))
        assert not expert.store.exists()


def test_expert_that_workers_know_is_not_begun_anew_unasked(
    connection: Connection, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An aggregator started on an emptied Redis sees a worker's heartbeat, and remembers that: until --new-lineage."""
    request = SpecRequest(base_model=str(tiny_model_dir), lora=LoraSettings(rank=2))
    ensure_experts(connection, {"sql_expert": 1.0}, request)
    store = ExpertStore(connection, "sql_expert")
    worker = ScriptedWorker(connection, store.spec(), fingerprint=store.load().meta.base_fingerprint)
    connection.client.flushall()
    worker.store.beat(Beat(run=worker.ledger.run, lineage=worker.ledger.meta.lineage), ttl_s=60)
    assert ensure_experts(connection, {"sql_expert": 1.0}, request) == []
    assert f"but worker alice trains on (lineage {worker.ledger.meta.lineage})" in caplog.text
    worker.store.leave()  # the operator stops the workers to think about it
    assert ensure_experts(connection, {"sql_expert": 1.0}, request) == []
    assert not store.exists()
    assert ensure_experts(connection, {"sql_expert": 1.0}, replace(request, new_lineage=True)) == [
        "sql_expert"
    ]
    change = worker.pull()
    assert change.replace
    worker.push(0.1)
    expert = Expert(store, store.spec(), aggregator="test")
    expert.load()
    assert serve(expert) == ["applied"]


def test_emptied_redis_has_lost_all_experts(connection: Connection) -> None:
    """Also the one that no worker trains at present: a worker of another one is heard of."""
    stores = [ExpertStore(connection, name) for name in ("docs_expert", "sql_expert")]
    WorkerStore(connection, "sql_expert", "alice").beat(Beat(lineage="0123456789abcdef"), ttl_s=60)
    assert without_trained(stores, since=0.0, stop=threading.Event()) == []
    assert [store.lost() for store in stores] == [{"alice": "0123456789abcdef"}] * 2
    assert without_lost(stores) == []


def test_status_tells_of_an_expert_that_only_workers_know(connection: Connection) -> None:
    """Not that there are no experts yet, and that one should begin them."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    connection.client.flushall()
    worker.store.beat(Beat(run=worker.ledger.run), ttl_s=60)
    told = list(findings(Inspector(connection).federation()))
    assert any("sql_expert is not in Redis, but worker alice trains it" in line for line in told)
    assert not any("start `fedmoe aggregator run`" in line for line in told)


@pytest.mark.timeout(120)
def test_command_waits_until_the_operator_decides(
    tmp_path: Path, redis_url: str, connection: Connection, tiny_model_dir: Path
) -> None:
    """`fedmoe aggregator run` on an emptied Redis: says so, waits, and serves what somebody writes back."""
    request = SpecRequest(base_model=str(tiny_model_dir), lora=LoraSettings(rank=2))
    ensure_experts(connection, {"sql_expert": 1.0}, request)
    store = ExpertStore(connection, "sql_expert")
    worker = ScriptedWorker(connection, store.spec(), fingerprint=store.load().meta.base_fingerprint)
    remembered = Expert(store, store.spec(), aggregator="test")
    remembered.load()
    connection.client.flushall()
    worker.store.beat(Beat(run=worker.ledger.run, lineage=worker.ledger.meta.lineage), ttl_s=60)
    log = tmp_path / "log"
    with running(
        log, "aggregator", "run", "--redis", redis_url, "--expert", "sql_expert",
        "--base-model", str(tiny_model_dir), "--rank", "2",
    ) as process:  # fmt: skip
        eventually("the sentence", lambda: "gone from Redis, but worker alice trains on" in log.read_text())
        assert process.poll() is None
        assert write_back(remembered, on="")
        worker.push(0.1)
        eventually("version 1", lambda: store.load().meta.version == 1)
    assert "Traceback" not in log.read_text()


def test_redis_that_is_away_is_not_taken_for_empty(connection: Connection) -> None:
    """No answer is no emptiness."""
    expert = make_expert(connection)
    nowhere = Connection(RedisSettings(url="redis://127.0.0.1:1"))
    server = ExpertServer(nowhere, "sql_expert", AggregatorSettings(), holder="one", retained=expert)
    with pytest.raises(RedisUnavailableError):
        server.turn(threading.Event())
    assert server.retained is expert
