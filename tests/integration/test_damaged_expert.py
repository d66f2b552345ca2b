"""A part of an expert in Redis is missing or is another one: it is recognised, named, not served, and repaired."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from consumers.verify import replay
from fedmoe.errors import DamagedExpertError, FedMoEError
from fedmoe.protocol.layout import stamped
from fedmoe.store.archive import Archive
from fedmoe.store.backup import BackupStore
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.backup import Backup, back_up, restore
from tests.federation import ScriptedWorker, make_expert, serve, serving, small_spec
from tests.processes import eventually, fedmoe_here

Connect = Callable[[], Connection]
NAME = "sql_expert"


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one aggregator, nobody else has to be waited for."""
    monkeypatch.setattr("consumers.recovery.settle.CLAIM_WAIT_S", 0.1)


def weights(connection: Connection) -> bytes:
    """The weights in Redis, without their stamp."""
    return stamped(GatewayStore(connection).history(NAME)[1], "")


def _delete(what: str) -> Callable[[Any, Any], None]:
    return lambda client, keys: client.delete(getattr(keys, what))


def _old_weights(client: Any, keys: Any) -> None:
    client.set(keys.weights, stamped(client.get(keys.weights), "0123456789abcdef"))


def _other_record(client: Any, keys: Any) -> None:
    client.hset(keys.decided, "alice", client.hget(keys.decided, "bob"))


DAMAGES = {
    "no decided updates": (_delete("decided"), "its decided updates are missing"),
    "one worker's is missing": (
        lambda client, keys: client.hdel(keys.decided, "alice"),
        "its hash of decided updates (1 workers) does not match its meta",
    ),
    "one worker's is another": (_other_record, "its hash of decided updates (2 workers) does not match"),
    "one worker's is no record": (
        lambda client, keys: client.hset(keys.decided, "alice", "x"),
        "its decided updates cannot be read",
    ),
    "no weights": (_delete("weights"), "its weights are missing"),
    "weights of another commit": (
        _old_weights,
        "its weights belong to commit 0123456789abcdef, but its meta expects",
    ),
    "no spec": (_delete("spec"), "its spec is missing"),
    "another spec": (
        lambda client, keys: client.set(keys.spec, small_spec(wire_format="bf16").to_json()),
        "its spec has digest",
    ),
    "no spec that can be read": (lambda client, keys: client.set(keys.spec, "{"), "its spec cannot be read"),
    "no meta": (_delete("meta"), "its meta is missing"),
    "meta without a field": (
        lambda client, keys: client.hdel(keys.meta, "weights_commit"),
        "its meta lacks a field or is malformed",
    ),
}


def damaged(connection: Connection, damage: str) -> tuple[Any, ScriptedWorker, str]:
    """An expert at version 2 with one part broken; a worker that joined before; and how the damage is called."""
    expert = make_expert(connection)
    waiting = ScriptedWorker(connection, expert.spec, "carol")
    for name in ("alice", "bob"):
        ScriptedWorker(connection, expert.spec, name).push(1.0)
    serve(expert)
    break_it, sentence = DAMAGES[damage]
    break_it(connection.client, expert.store.keys)
    waiting.push(1.0)
    return expert, waiting, sentence


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_not_served(
    connection: Connection, connect: Connect, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An aggregator that remembers nothing commits nothing on top of it; nobody backs it up or verifies it."""
    expert, _, sentence = damaged(connection, damage)
    with serving(connect(), "fresh"):
        eventually("the sentence", lambda: sentence in caplog.text, timeout_s=10)
    assert "fedmoe restore" in caplog.text
    assert connection.client.xlen(expert.store.keys.updates) == 1
    with pytest.raises(FedMoEError):
        GatewayStore(connection).history(NAME)
    with pytest.raises(FedMoEError):
        back_up(BackupStore(connection), tmp_path / "backup")
    assert not (tmp_path / "backup").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_memory_mends_it(
    connection: Connection, connect: Connect, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The aggregator that served it writes back what was lost, and what waits is decided, once."""
    expert = make_expert(connection)
    alice, bob = (ScriptedWorker(connection, expert.spec, name) for name in ("alice", "bob"))
    with serving(connect(), "one"):
        alice.push(1.0)
        bob.push(2.0)
        eventually("version 2", lambda: expert.store.load().meta.version == 2)
        before = weights(connection)
        DAMAGES[damage][0](connection.client, expert.store.keys)
        connection.client.client_kill_filter(_type="normal", skipme=True)  # so that it looks again
        eventually("all parts", lambda: not expert.store.condition().damage, timeout_s=10)
        assert weights(connection) == before
        eventually("its line", lambda: "wrote it back from memory at version 2" in caplog.text)
        for worker in (alice, bob):
            assert not worker.pull().resent
            worker.push(1.0)
        eventually("version 4", lambda: expert.store.load().meta.version == 4)
    alice.pull()
    bob.pull()
    assert torch.equal(alice.local, bob.local)


@pytest.mark.one_server
def test_operator_mends_it_by_a_backup(connection: Connection, connect: Connect, tmp_path: Path) -> None:
    """What was decided since the backup and is still kept by workers counts once."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec, "alice")
    worker.push(1.0)
    serve(expert)
    worker.pull()
    back_up(BackupStore(connection), tmp_path / "backup")
    worker.push(1.0)
    serve(expert)
    worker.pull()
    before = weights(connection)
    connection.client.delete(expert.store.keys.decided)
    with pytest.raises(DamagedExpertError):
        expert.load()
    restore(BackupStore(connection), Backup(tmp_path / "backup"), replace=True)
    expert.load()
    assert [str(u) for u in worker.pull().resent] == [f"{worker.ledger.run}:2"]
    worker.publish()
    assert serve(expert) == ["applied"]
    assert weights(connection) == before


def test_part_that_goes_while_it_is_served_is_noticed(
    connection: Connection, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a broken connection: an aggregator looks now and then."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    with serving(connect(), "one"):
        worker.push(1.0)
        eventually("version 1", lambda: expert.store.load().meta.version == 1)
        connection.client.delete(expert.store.keys.decided)
        eventually("all parts", lambda: not expert.store.condition().damage, timeout_s=10)
    assert "wrote it back from memory at version 1" in caplog.text


def test_what_can_be_derived_is_begun_again(
    connection: Connection, connect: Connect, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Packed weights and log: said, and the replay goes on from the weights that were kept then."""
    expert = make_expert(connection, spec=small_spec(wire_format="int4"))
    keys, client = expert.store.keys, connection.client
    worker = ScriptedWorker(connection, expert.spec)
    with serving(connect(), "one", keep_updates=tmp_path):
        worker.push(1.0)
        eventually("version 1", lambda: expert.store.load().meta.version == 1)
    packed = client.get(keys.packed)
    client.delete(keys.packed, keys.log)
    with serving(connect(), "two", keep_updates=tmp_path):
        eventually("packed weights", lambda: client.get(keys.packed) == packed)
        worker.pull()
        worker.push(1.0)
        eventually("version 2", lambda: expert.store.load().meta.version == 2)
    assert "the packed weights and the log did not match version 1" in caplog.text
    meta, file, lines = GatewayStore(connection).history(NAME)
    done = replay(expert.spec, meta, lines, Archive(tmp_path / NAME))
    assert (done.problem, done.since, done.version) == ("", 1, 2)
    assert done.weights.same_values(file)


@pytest.mark.one_server
def test_verify_says_that_an_expert_is_damaged(
    connection: Connection, redis_url: str, tmp_path: Path
) -> None:
    """It said equal, for the weights were."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    worker.push(1.0)
    serve(expert)
    connection.client.delete(expert.store.keys.decided)
    done = fedmoe_here("verify", "--redis", redis_url, "--keep-updates", str(tmp_path))
    assert done.returncode == 1
    assert "its decided updates are missing" in done.stdout
    assert "not verified: sql_expert" in done.stderr
