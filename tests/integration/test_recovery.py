"""Redis came back from an older file: who remembers more writes it back, and what is lost is told."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from consumers.aggregator import ExpertServer
from consumers.expert import Expert
from consumers.recovery.write_back import write_back
from consumers.verify import replay
from fedmoe.errors import NameTakenError
from fedmoe.protocol import features
from fedmoe.protocol.layout import stamped
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Header
from fedmoe.settings import AggregatorSettings
from fedmoe.store.archive import Archive
from fedmoe.store.backup import BackupStore
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.worker import WorkerStore
from fedmoe.tools.backup import Backup, back_up, restore
from tests.federation import LAYOUT, ScriptedWorker, aggregating, make_expert, serve, serving, small_spec
from tests.processes import eventually
from tests.rollback import Snapshot

Connect = Callable[[], Connection]
NAME = "sql_expert"


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one aggregator, nobody else has to be waited for."""
    monkeypatch.setattr("consumers.recovery.settle.CLAIM_WAIT_S", 0.1)


def weights(connection: Connection) -> bytes:
    """The weights in Redis, without their stamp."""
    return stamped(GatewayStore(connection).history(NAME)[1], "")


def fresh_expert(
    connection: Connection, spec: Spec, archive: Archive | None = None, **meta: object
) -> Expert:
    """One whose replay begins at version 0."""
    weights = initial_weights(spec.layout, spec.init_seed)
    return make_expert(connection, spec=spec, weights=weights, archive=archive, **meta)


def test_older_state_is_written_over_by_memory(
    connection: Connection, connect: Connect, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker published and ended; Redis comes back from an older file: the aggregator remembers, with all lines."""
    expert = fresh_expert(connection, small_spec(wire_format="int4"))
    worker, refused = (ScriptedWorker(connection, expert.spec, name) for name in ("alice", "bob"))
    with serving(connect(), "one", keep_updates=tmp_path):
        worker.push(1.0)
        eventually("version 1", lambda: expert.store.load().meta.version == 1)
        worker.pull()
        snapshot = Snapshot.take(connection)
        for version in range(2, 6):
            worker.push(1.0)
            eventually("the next version", lambda v=version: expert.store.load().meta.version == v)
            worker.pull()
        refused.push(1e6)
        eventually("a refusal", lambda: expert.store.load().meta.refused == 1)
        before, decided = weights(connection), expert.store.load().decided
        snapshot.bring_back(connection)
        assert expert.store.load().meta.version == 1
        eventually("version 5", lambda: expert.store.load().meta.version == 5, timeout_s=10)
        assert weights(connection) == before
        assert expert.store.load().decided == decided
    assert (
        "an older state of the expert (version 1, in memory 5); this aggregator wrote it back" in caplog.text
    )
    meta, file, lines = GatewayStore(connection).history(NAME)
    assert [line["version"] for line in lines] == ["1", "2", "3", "4", "5"]
    assert connection.client.xlen(expert.store.keys.dead) == 1
    done = replay(expert.spec, meta, lines, Archive(tmp_path / NAME))
    assert (done.problem, done.since) == ("", 0)
    assert done.weights.same_values(file)
    assert not worker.pull().resent


def test_standby_waits_for_whoever_remembers_more(
    connection: Connection, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """It would commit on top of the older state, and the newer one could not be written back any more."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    snapshot = Snapshot.take(connection)
    worker.push(1.0)
    serve(expert)
    snapshot.bring_back(connection)
    expert.store.claim("another", 1)
    worker.publish()
    with serving(connect(), "standby"):
        eventually("the sentence", lambda: "another aggregator retains version 1" in caplog.text)
        assert expert.store.load().meta.version == 0
        assert write_back(expert, on=expert.store.load().meta.commit)
        eventually("the duplicate", lambda: expert.store.load().meta.duplicate == 1, timeout_s=10)
    assert expert.store.load().meta.version == 1


def test_standby_gives_others_time_to_claim(
    connection: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection broke, and it holds the lease at once: perhaps Redis went back, and somebody remembers more."""
    monkeypatch.setattr("consumers.recovery.settle.CLAIM_WAIT_S", 2.0)
    make_expert(connection)
    now, stop = [0.0], threading.Event()
    its_own = connect()
    standby = ExpertServer(its_own, NAME, AggregatorSettings(), holder="standby", clock=lambda: now[0])
    lease = connection.keys.expert(NAME).lease
    connection.client.set(lease, "another")
    standby.turn(stop)
    its_own.client.connection_pool.disconnect()
    standby.turn(stop)
    connection.client.delete(lease)
    standby.turn(stop)
    assert not standby.is_serving
    now[0] = 2.5
    standby.turn(stop)
    assert standby.is_serving


def test_dead_claim_is_forgotten(
    connection: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An aggregator that claimed to remember more, and died: the others go on without it."""
    monkeypatch.setattr("fedmoe.store.lifecycle.CLAIM_MS", 3000)
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    with serving(connect(), "one") as (server, _):
        eventually("the expert in memory", lambda: server.is_serving)
        connection.client.flushdb()
        expert.store.claim("dead", 99)
        eventually("the expert", expert.store.exists)
        worker.push(1.0)
        eventually("version 1", lambda: expert.store.load().meta.version == 1)


def forked(connection: Connection, keep: Path | None) -> tuple[Any, Any, list[ScriptedWorker]]:
    """An aggregator that remembers version 4, and a Redis that went back and was committed to by somebody else."""
    archive = Archive(keep / NAME) if keep else None
    expert = fresh_expert(connection, small_spec(), archive)
    alice, bob, carol = (ScriptedWorker(connection, expert.spec, name) for name in ("alice", "bob", "carol"))
    alice.push(1.0)
    serve(expert)
    alice.pull()
    snapshot = Snapshot.take(connection)
    for _ in range(2):
        alice.push(1.0)
        serve(expert)
        alice.pull()
    bob.push(2.0)
    serve(expert)
    snapshot.bring_back(connection)
    other = type(expert)(expert.store, expert.spec, aggregator="other", archive=archive)
    other.load()
    carol.push(4.0)
    assert serve(other) == ["applied"]
    return expert, other, [alice, bob, carol]


def test_kept_updates_are_announced_again_if_somebody_committed_first(
    connection: Connection, connect: Connect, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of them counts once, also if its worker sends it again."""
    expert, other, (alice, bob, _) = forked(connection, tmp_path)
    bob.publish()
    with serving(connect(), "one", keep_updates=tmp_path, memory=expert):
        eventually("version 5", lambda: other.store.load().meta.version == 5, timeout_s=10)
        eventually("an empty stream", lambda: not connection.client.xlen(other.store.keys.updates))
    assert "version 4 in memory, version 2 in Redis, last committed by other" in caplog.text
    assert "3 updates are missing, 3 of them are resent" in caplog.text
    meta, file, lines = GatewayStore(connection).history(NAME)
    assert sorted((line["worker"], line["seq"]) for line in lines) == [
        ("alice", "1"), ("alice", "2"), ("alice", "3"), ("bob", "1"), ("carol", "1"),
    ]  # fmt: skip
    done = replay(expert.spec, meta, lines, Archive(tmp_path / NAME))
    assert not done.problem
    assert done.weights.same_values(file)
    assert not alice.pull().resent


def test_kept_updates_are_announced_as_an_earlier_aggregator_reads_them(
    connection: Connection, connect: Connect, tmp_path: Path
) -> None:
    """It committed first and holds the lease, and bob, whose update would be undecidable, has gone."""
    expert, other, (_, bob, _) = forked(connection, tmp_path)
    keys, earlier = other.store.keys, features.FEATURES - {features.QUICK_DIGESTS}
    connection.client.hset(keys.meta, "knows", " ".join(sorted(earlier)))
    connection.client.set(keys.lease, "an earlier one")
    header = keys.header("bob", *bob.ledger.queue[0].id)
    assert not connection.client.exists(header)
    with serving(connect(), "one", keep_updates=tmp_path, memory=expert):
        eventually("bob's update", lambda: connection.client.exists(header), timeout_s=10)
    sent = Header.unpack(connection.client.get(header))
    assert sent.requires == ""
    assert [len(part.digest) for part in sent.parts] == [32]
    assert serve(other) == ["applied"] * 3


def test_kept_updates_of_a_later_release_stop_nobody(
    connection: Connection,
    connect: Connect,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An aggregator went back one release: it names what it cannot send again, and serves on."""
    with monkeypatch.context() as later:
        later.setattr(features, "UPDATES_REQUIRE", "signing")
        later.setattr(features, "FEATURES", frozenset({"signing"}))
        later.setattr(
            WorkerStore, "_check_aggregators", lambda *_: None
        )  # before the first commit says what is known
        expert, other, _ = forked(connection, tmp_path)
    with serving(connect(), "one", keep_updates=tmp_path, memory=expert):
        eventually(
            "the count",
            lambda: "3 updates are missing, 0 of them are resent" in caplog.text,
            timeout_s=10,
        )
        ScriptedWorker(connection, expert.spec, "dan").push(1.0)
        eventually(
            "dan's update", lambda: connection.client.hexists(other.store.keys.decided, "dan"), timeout_s=10
        )
    assert "needs signing, which the FedMoE on this machine does not know" in caplog.text


def test_undone_updates_are_counted_where_nobody_kept_them(
    connection: Connection, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """Their workers send again what they still have."""
    expert, other, (alice, *_) = forked(connection, None)
    with serving(connect(), "one", memory=expert):
        eventually("the sentence", lambda: "3 updates are missing, 0 of them are resent" in caplog.text)
        assert len(alice.pull().resent) == 2
        alice.publish()
        eventually("version 3", lambda: other.store.load().meta.version == 3, timeout_s=10)


def test_kept_update_far_ahead_of_an_expert_that_went_back_is_applied(
    connection: Connection, connect: Connect, tmp_path: Path
) -> None:
    """What came before it was not kept here: its base is further ahead than an update may be."""
    expert = fresh_expert(connection, small_spec(), rules=aggregating(max_staleness=3))
    snapshot = Snapshot.take(connection)
    alice, carol = (ScriptedWorker(connection, expert.spec, name) for name in ("alice", "carol"))
    for _ in range(6):
        alice.push(1.0)
        serve(expert)
        alice.pull()
    expert = Expert(expert.store, expert.spec, aggregator="test", archive=Archive(tmp_path / NAME))
    expert.load()
    ScriptedWorker(connection, expert.spec, "bob").push(2.0)
    serve(expert)
    snapshot.bring_back(connection)
    other = type(expert)(expert.store, expert.spec, aggregator="other")
    other.load()
    carol.push(4.0)
    assert serve(other) == ["applied"]
    with serving(connect(), "one", keep_updates=tmp_path, memory=expert):
        eventually("bob's update", lambda: connection.client.hexists(other.store.keys.decided, "bob"))
    assert (other.store.load().meta.version, other.store.load().meta.refused) == (2, 0)


def test_full_redis_is_written_back_to(
    connection: Connection, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """It came back from an older file and is full: what is in memory goes back beyond the limit, as a commit does."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    snapshot = Snapshot.take(connection)
    worker.push(1.0)
    serve(expert)
    snapshot.bring_back(connection)
    connection.client.config_set("maxmemory", 1)
    with serving(connect(), "one", memory=expert):
        eventually("version 1", lambda: expert.store.load().meta.version == 1)
    connection.client.config_set("maxmemory", 0)
    assert "wrote it back from memory at version 1" in caplog.text


def test_damage_is_not_taken_for_another_history(
    connection: Connection, connect: Connect, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody committed, and then the decisions were removed: nothing is announced again, and memory is kept."""
    expert, _, _ = forked(connection, tmp_path)
    connection.client.delete(expert.store.keys.decided)
    with serving(connect(), "one", keep_updates=tmp_path, memory=expert) as (server, _):
        eventually("the sentence", lambda: "retains another history" in caplog.text)
        assert server.retained is expert
    assert connection.client.xlen(expert.store.keys.updates) == 0


def test_both_versions_are_told_without_anything_kept(
    connection: Connection, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """An aggregator that was started again never passed through the older commit that Redis comes back with."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    snapshot = Snapshot.take(connection)
    worker.push(1.0)
    serve(expert)
    again = Expert(expert.store, expert.spec, aggregator="again")
    again.load()
    snapshot.bring_back(connection)
    with serving(connect(), "again", memory=again):
        eventually(
            "the sentence",
            lambda: "Redis has an older state: version 1 in memory, version 0 in Redis" in caplog.text,
        )


def test_run_with_decided_updates_stops_before_another_of_its_number(connection: Connection) -> None:
    """Two living runs of one number: the one that has decided updates must not send them again behind the other."""
    expert = make_expert(connection)
    snapshot = Snapshot.take(connection)
    old = ScriptedWorker(connection, expert.spec)
    snapshot.bring_back(connection)
    new = ScriptedWorker(connection, expert.spec)
    assert new.ledger.run.split("-")[0] == old.ledger.run.split("-")[0]
    old.push(1.0)
    assert serve(expert) == ["applied"]
    old.pull()
    new.push(2.0)
    assert serve(expert) == ["undecidable"]
    new.pull()
    new.publish()
    assert serve(expert) == ["applied"]
    with pytest.raises(NameTakenError):
        old.pull()


def test_next_run_has_a_number_of_its_own_after_a_write_back(connection: Connection) -> None:
    """Redis forgot how many runs a worker had; the write-back tells it."""
    expert = make_expert(connection)
    snapshot = Snapshot.take(connection)
    old = ScriptedWorker(connection, expert.spec)
    old.push(1.0)
    serve(expert)
    snapshot.bring_back(connection)
    assert write_back(expert, on=expert.store.condition().commit)
    assert old.store.next_incarnation() == 2


def test_restore_is_not_undone(
    connection: Connection, connect: Connect, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An older backup that an operator puts in place stays there, though memory and kept updates know more."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    back_up(BackupStore(connection), tmp_path / "backup")
    with serving(connect(), "one", keep_updates=tmp_path / "kept") as (server, _):
        worker.push(1.0)
        eventually("version 1", lambda: expert.store.load().meta.version == 1)
        restore(BackupStore(connection), Backup(tmp_path / "backup"), replace=True)
        connection.client.client_kill_filter(_type="normal", skipme=True)
        eventually(
            "the sentence", lambda: "an operator replaced the expert; going on from version 0" in caplog.text
        )
        eventually("it serves", lambda: server.is_serving)
        assert expert.store.load().meta.version == 0
        assert len(worker.pull().resent) == 0  # nothing was decided that it knows of
        worker.publish()
        eventually("version 1", lambda: expert.store.load().meta.version == 1)
        eventually("an empty stream", lambda: not connection.client.xlen(expert.store.keys.updates))
        assert expert.store.load().meta.duplicate == 0  # it was applied again, not written back from memory


def test_worker_started_while_redis_was_behind_goes_on(connection: Connection) -> None:
    """Redis forgot how many runs it had; when memory is written back, the worker meets a run of its own number."""
    expert = make_expert(connection)
    snapshot = Snapshot.take(connection)
    old = ScriptedWorker(connection, expert.spec)
    old.push(1.0)
    serve(expert)
    snapshot.bring_back(connection)
    new = ScriptedWorker(connection, expert.spec)
    new.push(2.0)
    assert new.ledger.run.split("-")[0] == old.ledger.run.split("-")[0]
    assert write_back(expert, on=expert.store.condition().commit)
    expert.load()
    assert serve(expert) == ["undecidable"]
    assert not new.pull().lost
    new.publish()
    assert serve(expert) == ["applied"]
    new.pull()
    assert torch.equal(new.local, torch.arange(LAYOUT.numel) + 1.0 + 2.0 / 2)
