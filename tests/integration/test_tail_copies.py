"""The parts of the tail's updates are copied within Redis: what is folded, kept and removed."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
import torch

import fedmoe.protocol.features
from consumers.aggregator import ExpertServer
from consumers.compaction import compact
from consumers.expert import Expert
from fedmoe.errors import ProtocolError, StaleStateError
from fedmoe.protocol.beat import Beat
from fedmoe.protocol.features import COPIES, TAIL
from fedmoe.protocol.keys import Keys
from fedmoe.protocol.records import Meta
from fedmoe.protocol.tail import Copy
from fedmoe.settings import AggregatorSettings, RedisSettings
from fedmoe.store.change import change_rules
from fedmoe.store.connection import Connection
from fedmoe.store.copies import Copies, is_copied
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.permissions import AGGREGATOR, NO_COPIED_TAIL, NO_COPIES, acl_rules
from fedmoe.store.remove import remove_expert
from fedmoe.store.worker import WorkerStore
from tests.errors import raises
from tests.federation import ScriptedWorker, serve
from tests.integration.test_tail import (
    NAME,
    begin,
    check_readers,
    copies_of,
    kept_state,
    meta_of,
    train,
)
from tests.protocol.actors import OneTurn, TurnOver
from tests.strategies import randn


def expiring(expert: Expert) -> list[str]:
    """The copies that no commit has made permanent."""
    return [key for key in copies_of(expert) if expert.store.connection.client.pttl(key) > 0]


def test_a_hash_of_the_release_before_is_read_and_grows(connection: Connection, tmp_path: Path) -> None:
    """A real dump of it: readers fold a tail whose first parts are fields, and whose last are copies."""
    kept, keys = kept_state(connection, "expert-before-copies"), connection.keys.expert(NAME)
    assert connection.client.hget(keys.meta, "requires") == TAIL.encode()
    assert sorted(connection.client.hkeys(keys.tail)) == [b"3", b"3:0"]
    spec = GatewayStore(connection).spec(NAME)
    expert = Expert(ExpertStore(connection, NAME), spec, aggregator="one")
    expert.load()
    assert expert.store.is_unchanged(expert.meta, n_decided=len(expert.decided))
    train(expert, 1, name="carol")
    meta = meta_of(expert)
    assert (meta.tail.snapshot_version, meta.version) == (2, kept["version"] + 1)
    assert meta.requires == f"{COPIES} {TAIL}"
    assert len(copies_of(expert)) == 1
    assert expert.store.is_unchanged(expert.meta, n_decided=len(expert.decided))
    assert not expert.store.condition().damage
    heir = Expert(expert.store, spec, aggregator="heir")
    heir.load()
    assert bytes(heir.buffer.file) == bytes(expert.buffer.file)
    reader = ScriptedWorker(connection, spec, "reader")
    assert reader.store.pull_exact(spec).exact == (bytes(expert.buffer.file)[len(spec.layout.header) :],)
    compact(expert)
    assert copies_of(expert) == []
    assert not connection.client.exists(keys.tail)


def test_a_worker_of_the_release_before_keeps_it_without_copies(connection: Connection) -> None:
    """It reads a tail in the hash, and could not read copies: the aggregator writes the weights instead."""
    kept_state(connection, "expert-before-copies")
    old = WorkerStore(connection, NAME, "old")
    old.beat(Beat(run="1-00000000", knows=TAIL), ttl_s=60)
    settings = AggregatorSettings(block_ms=1, burst=True)
    server = ExpertServer(connection, NAME, settings, holder="one", clock=lambda: 1.0)
    server.turn(threading.Event())
    assert server.retained is not None
    assert not meta_of(server.retained).tail
    ScriptedWorker(connection, server.retained.spec).push(0.1)
    server.turn(threading.Event())
    meta = meta_of(server.retained)
    assert (meta.version, bool(meta.tail), meta.requires) == (4, False, "")


def test_what_is_not_applied_leaves_no_copy(connection: Connection, tmp_path: Path) -> None:
    """A refused update, one whose part is damaged, too long, of another type, or gone."""
    expert = begin(connection, tmp_path)
    keys = expert.store.keys
    spoils: list[Callable[[str], Any]] = [
        lambda key: connection.client.setrange(key, 0, "xxxx"),
        lambda key: connection.client.append(key, "x" * 1000),
        lambda key: (connection.client.delete(key), connection.client.sadd(key, "x")),
        connection.client.delete,
    ]
    for number, spoil in enumerate(spoils):
        worker = ScriptedWorker(connection, expert.spec, f"w{number}")
        update = worker.push(0.1)
        spoil(keys.part(f"w{number}", *update.id, 0))
        assert serve(expert) == ["undecidable"]
        assert copies_of(expert) == []
    large = ScriptedWorker(connection, expert.spec, "large")
    large.push(1e6)
    assert serve(expert) == ["refused"]
    assert copies_of(expert) == []
    train(expert, 1)
    assert len(copies_of(expert)) == 1
    check_readers(expert, tmp_path)


def test_a_batch_that_outweighs_the_weights_leaves_no_copy(connection: Connection, tmp_path: Path) -> None:
    """The weights are written, and the copies of this batch and of the tail before go with the commit."""
    expert = begin(connection, tmp_path, wire_format="bf16")
    train(expert, 1)
    assert len(copies_of(expert)) == 1
    for number in range(4):
        ScriptedWorker(connection, expert.spec, f"w{number}").push(
            0.1 * randn(number, expert.spec.layout.numel)
        )
    assert set(serve(expert)) == {"applied"}
    assert not meta_of(expert).tail
    assert copies_of(expert) == []
    check_readers(expert, tmp_path)


def test_an_aggregator_that_dies_before_its_commit_leaves_what_expires(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its worker's part never expires; one that was overtaken removes its copies at once."""
    expert = begin(connection, tmp_path)
    worker = ScriptedWorker(connection, expert.spec)
    update = worker.push(0.1)
    connection.client.persist(expert.store.keys.part("alice", *update.id, 0))

    def killed(pipe: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fedmoe.store.expert.execute", killed)
        with pytest.raises(KeyboardInterrupt):
            serve(expert)
    [orphan] = expiring(expert)
    change_rules(expert.store, {"lr": 0.5})
    with raises(StaleStateError, about="commit"):
        expert.process(expert.store.reclaim())
    assert copies_of(expert) == [orphan]
    expert.load()
    assert [verdict.outcome.value for verdict in expert.process(expert.store.reclaim())] == ["applied"]
    assert len(copies_of(expert)) == 2
    remove_expert(connection, NAME)
    assert copies_of(expert) == []


def test_a_copy_that_expires_before_the_commit_makes_it_fail(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is left of it is removed."""
    expert = begin(connection, tmp_path)
    ScriptedWorker(connection, expert.spec).push(0.1)
    look = expert.store.check_head

    def late(*what: Any) -> Any:
        connection.client.delete(copies_of(expert)[0])
        return look(*what)

    with monkeypatch.context() as patched, raises(StaleStateError, about="parts"):
        patched.setattr(expert.store, "check_head", late)
        serve(expert)
    assert copies_of(expert) == []
    assert meta_of(expert).version == 0
    expert.load()
    assert [v.outcome.value for v in expert.process(expert.store.reclaim())] == ["applied"]
    check_readers(expert, tmp_path)


def test_a_reader_comes_to_an_end_beside_a_busy_aggregator(
    connection: Connection, connect: Callable[[], Connection], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit removes the copies each time while they are read: then all of them are read at once."""
    expert = begin(connection, tmp_path)
    train(expert, 1)
    reader = GatewayStore(connect())
    mget = reader.connection.client.mget
    commits: list[list[str]] = []

    def mget_after_a_commit(names: list[str]) -> Any:
        compact(expert)
        train(expert, 1, seed=len(commits), name=f"w{len(commits)}")
        commits.append(names)
        return mget(names)

    monkeypatch.setattr(reader.connection.client, "mget", mget_after_a_commit)
    meta, weights = reader.read(NAME)
    assert len(commits) == 3
    assert weights == bytes(expert.buffer.file)
    assert meta.commit == expert.meta.commit


def test_a_reader_has_a_few_parts_in_memory(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many parts an update has."""
    expert = begin(connection, tmp_path)
    names = [expert.store.keys.tail_part("t", index) for index in range(5)]
    connection.client.mset({name: str(number) for number, name in enumerate(names) if number != 3})
    asked: list[int] = []

    class Client:
        def mget(self, some: list[str]) -> list[bytes | None]:
            asked.append(len(some))
            found: list[bytes | None] = connection.client.mget(some)
            return found

    monkeypatch.setattr("fedmoe.store.copies.AT_ONCE", 2)
    copies = Copies(Client(), expert.store.keys, {})
    parts = copies("t", 5)
    assert (next(parts), asked, copies.is_one_gone) == (b"0", [2], False)
    assert list(parts) == [b"1", b"2", None, b"4"]
    assert (asked, copies.is_one_gone) == ([2, 2, 1], True)


def test_an_earlier_release_refuses(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would look for the parts in the hash. Once the weights are written, it reads the expert."""
    expert = begin(connection, tmp_path)
    train(expert, 1)
    known = fedmoe.protocol.features.FEATURES - {COPIES}
    with monkeypatch.context() as earlier, raises(ProtocolError, about="requires"):
        earlier.setattr(fedmoe.protocol.features, "FEATURES", known)
        expert.load()
    compact(expert)
    monkeypatch.setattr(fedmoe.protocol.features, "FEATURES", known)
    expert.load()


@pytest.mark.parametrize("lacks", ["keys", "command"])
def test_a_user_who_may_not_copy_goes_on_and_is_told_once(
    server: EmbeddedRedis,
    connection: Connection,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    lacks: str,
) -> None:
    """An aggregator enrolled by an earlier release writes the weights in each commit, until it has the rights."""
    expert, client = begin(connection, tmp_path), connection.client
    worker, now, rights = ScriptedWorker(connection, expert.spec), 100.0, AGGREGATOR.rights(Keys(), "*", "")
    known = [right for right in rights if right.without not in (NO_COPIES, NO_COPIED_TAIL)]
    earlier = acl_rules(tuple(known)) if lacks == "keys" else [*acl_rules(rights), "-copy"]
    of_user = Connection(RedisSettings(url=f"unix://one:pw@{server.socket}"))
    settings = AggregatorSettings(lease_s=4.0, burst=True)
    serving = ExpertServer(of_user, NAME, settings, holder="h", clock=lambda: now)

    def trained(rules: Sequence[str]) -> bool:
        nonlocal now
        client.execute_command("ACL", "SETUSER", "one", "reset", "on", ">pw", *rules)
        now += 5.0
        worker.push(0.1)
        serving.turn(threading.Event())
        worker.pull()
        serving.turn(threading.Event())
        return bool(meta_of(expert).tail)

    try:
        assert [trained(earlier), trained(earlier)] == [False, False]
        assert copies_of(expert) == []
        told = [message for message in caplog.messages if "may not copy" in message]
        assert len(told) == 1
        assert "fedmoe operator refresh" in told[0]
        assert trained(acl_rules(rights))
        assert meta_of(expert).applied == 3
    finally:
        of_user.close()
        client.execute_command("ACL", "DELUSER", "one")


def test_a_full_redis_commits_and_then_compacts(server: EmbeddedRedis, tmp_path: Path) -> None:
    """Nothing is copied: the commit, beyond the limit, writes the weights, as all do until there is room again."""
    now = 1000.0
    with EmbeddedRedis(server=server.server, options=["--appendonly", "no"]) as own:
        connection, settings = Connection(RedisSettings(url=own.url)), AggregatorSettings(block_ms=1)
        expert = begin(connection, tmp_path)
        serving = ExpertServer(
            Connection(connection.settings), NAME, settings, holder="one", clock=lambda: now
        )

        def turn() -> Meta:
            with pytest.raises(TurnOver):
                serving.run(OneTurn())
            return meta_of(expert)

        turn()
        worker = ScriptedWorker(connection, expert.spec)
        tails = []
        for limit in (1, 1, 0):
            worker.push(0.1)
            connection.client.config_set("maxmemory", limit)
            tails.append(turn().tail)
            assert not turn().tail or not limit
            connection.client.config_set("maxmemory", 0)
            worker.pull()
            now += settings.lease_s + 1  # it asks again how full Redis is
            turn()
        assert [bool(tail) for tail in tails] == [False, False, True]
        assert meta_of(expert).version == 3
        check = Expert(expert.store, expert.spec, aggregator="heir")
        check.load()
        assert serving.retained
        assert torch.equal(check.buffer.flat, serving.retained.buffer.flat)
        serving.store.connection.close()
        connection.close()


def test_parts_that_are_read_though_redis_is_full(connection: Connection, tmp_path: Path) -> None:
    """By readers of a tail that was there before."""
    expert = begin(connection, tmp_path)
    train(expert, 2)
    connection.client.config_set("maxmemory", 1)
    try:
        assert GatewayStore(connection).read(NAME)[1] == bytes(expert.buffer.file)
        expert.load()
        assert expert.store.is_unchanged(expert.meta, n_decided=len(expert.decided))
    finally:
        connection.client.config_set("maxmemory", 0)


def test_what_else_goes_wrong_is_raised(connection: Connection) -> None:
    """Only a full Redis and a lacking right make an aggregator go on without copies."""
    copy = Copy("t", 1)
    with pytest.raises(redis.ResponseError):
        is_copied(redis.ResponseError("LOADING"), copy)
    assert not is_copied(redis.ResponseError("WRONGTYPE"), copy)
    assert copy.refused is None


def test_a_server_that_starts_again_has_the_copies(server: EmbeddedRedis, tmp_path: Path) -> None:
    """It restores them from its append-only file, after the payload and the first expiry of the copy have passed."""
    with EmbeddedRedis(
        server=server.server, options=["--appendonly", "yes", "--enable-debug-command", "yes"]
    ) as own:
        connection = Connection(RedisSettings(url=own.url))
        expert = begin(connection, tmp_path)
        with pytest.MonkeyPatch.context() as soon:
            soon.setattr("fedmoe.store.copies.PART_TTL_MS", 1000)
            soon.setattr("fedmoe.store.worker.PAYLOAD_TTL_S", 1)
            train(expert, 1)
        time.sleep(1.1)
        connection.client.execute_command("DEBUG", "LOADAOF")
        assert len(copies_of(expert)) == 1
        assert expiring(expert) == []
        check_readers(expert, tmp_path)
        connection.close()
