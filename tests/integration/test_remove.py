"""`fedmoe expert remove`: gone for everybody, whoever runs; and the list of experts is what is served."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from consumers.create import SpecRequest, ensure_experts
from consumers.expert import Expert
from consumers.gateway.builder import GatewayBuilder
from consumers.recovery.write_back import write_back
from fedmoe.errors import RemovedExpertError, StaleStateError
from fedmoe.protocol.beat import Beat
from fedmoe.protocol.condition import Condition
from fedmoe.settings import GatewaySettings
from fedmoe.store.backup import BackupStore
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.inspect import Inspector
from fedmoe.store.remove import remove_expert, sweep
from fedmoe.store.worker import WorkerStore
from fedmoe.tools.backup import restore
from producers.outbox import Outbox
from tests.backups import backed_up
from tests.counting import join
from tests.errors import raises
from tests.federation import FINGERPRINT, ScriptedWorker, make_expert, serve, serving, small_spec
from tests.processes import eventually, fedmoe, fedmoe_here

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]
META = "fedmoe:{sql_expert}:meta"


def keys_of(connection: Connection) -> list[str]:
    return sorted(key.decode() for key in connection.client.scan_iter(match="fedmoe:{sql_expert}:*"))


def builder(connection: Connection) -> GatewayBuilder:
    return GatewayBuilder(connection, GatewaySettings(), holder="agg-1", lease_s=5.0)


def test_those_who_serve_it_end_and_nobody_writes_it_back(connection: Connection, connect: Connect) -> None:
    """The holder of the lease, which remembers it, and a standby; nothing of it is left but that it was removed."""
    make_expert(connection)
    with serving(connect(), "one") as one, serving(connect(), "two") as two:
        worker = ScriptedWorker(connect(), small_spec())
        worker.push(0.5)
        eventually("it is applied", lambda: int(connection.client.hget(META, "version")) == 1)
        remove_expert(connection, "sql_expert")
        for served in (one, two):
            served.thread.join(30)
            assert not served.thread.is_alive()
    assert keys_of(connection) == [META]
    assert connection.client.hgetall(META).keys() == {b"removed", b"name", b"commit"}
    assert connection.client.hgetall("fedmoe:experts") == {}


def test_memory_is_not_written_back_on_top_of_a_removal(expert: Expert) -> None:
    """Not even by an aggregator that had seen an emptied Redis just before, nor by one that commits."""
    connection, store = expert.store.connection, expert.store
    ScriptedWorker(connection, small_spec()).push(0.5)
    entries = store.read(block_ms=1, count=1)
    seen = Condition(commit="", meta=None, damage="", weights_commit="", decided={}, logged_version=-1)
    remove_expert(connection, "sql_expert")
    assert not write_back(expert, on=seen.commit)
    assert not store.create(expert.spec, expert.meta, expert.buffer.file)
    with raises(StaleStateError, about="commit"):
        expert.process(entries)
    for use in (store.condition, store.spec, store.load):
        with raises(RemovedExpertError, about="sql_expert") as caught:
            use()
        assert caught.value.when.startswith("20")
    assert keys_of(connection) == [META]


@pytest.fixture
def expert(connection: Connection) -> Expert:
    """One that is served."""
    return make_expert(connection)


def test_its_workers_end_with_one_sentence(expert: Expert, connect: Connect) -> None:
    """Whatever they ask; what they wrote meanwhile is swept away."""
    scripted = ScriptedWorker(connect(), small_spec())
    remove_expert(expert.store.connection, "sql_expert")
    for fails in (
        scripted.store.spec,
        scripted.store.meta,
        lambda: scripted.store.pull(small_spec(), known=""),
    ):
        with pytest.raises(RemovedExpertError):
            fails()
    scripted.push(0.5)
    with pytest.raises(RemovedExpertError):
        scripted.store.poll("0-1", scripted.ledger.queue[0].header)
    scripted.store.leave()
    assert sweep(expert.store.connection, "sql_expert") == ()
    assert keys_of(expert.store.connection) == [META]


def test_a_worker_in_training_ends(expert: Expert, connect: Connect) -> None:
    """At its next look: the reason is the sync's failure, which the command prints."""
    sync = join(connect().settings).sync
    sync.outbox = Outbox(must_pull=True)
    remove_expert(expert.store.connection, "sql_expert")
    sync.run()
    assert isinstance(sync.failure, RemovedExpertError)


def test_it_is_begun_anew_only_when_told(
    connection: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start of its aggregator makes it again only with --new-lineage; others are made as ever."""
    base = {"fingerprint": FINGERPRINT, "tokenizer": "", "reach": float("nan"), "not_reached": ""}
    monkeypatch.setattr("consumers.create.ensure.look_at_base", lambda request, stop: base)
    monkeypatch.setattr("consumers.create.ensure.make_spec", lambda request, described: small_spec())
    request = SpecRequest()
    ensure_experts(connection, {"sql_expert": 1.0}, request)
    remove_expert(connection, "sql_expert")
    assert ensure_experts(connection, {"sql_expert": 1.0, "docs_expert": 1.0}, request) == ["docs_expert"]
    assert connection.client.hkeys("fedmoe:experts") == [b"docs_expert"]
    with serving(connect()) as served:
        served.thread.join(30)
        assert not served.thread.is_alive()
    assert ensure_experts(connection, {"sql_expert": 1.0}, SpecRequest(new_lineage=True)) == ["sql_expert"]
    assert ExpertStore(connection, "sql_expert").load().meta.version == 0
    assert b"removed" not in connection.client.hgetall(META)
    assert sweep(connection, "sql_expert") == ()


def test_a_backup_brings_it_back(connection: Connection, tmp_path: Path) -> None:
    """Without --replace: there is nothing to replace."""
    expert = make_expert(connection)
    ScriptedWorker(connection, small_spec()).push(0.5)
    serve(expert)
    backup = backed_up(connection, tmp_path / "backup")
    remove_expert(connection, "sql_expert")
    restore(BackupStore(connection), backup)
    assert ExpertStore(connection, "sql_expert").load().meta.version == 1
    assert connection.client.hkeys("fedmoe:experts") == [b"sql_expert"]


def test_what_is_only_missing_from_the_list_is_listed_again(
    connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """And said; what was removed and listed by somebody again is taken off, and the gateway goes on without it."""
    for name in ("a", "b"):
        make_expert(connection, name)
    gateway = builder(connection)
    gateway.refresh()
    connection.client.hdel("fedmoe:experts", "b")
    WorkerStore(connection, "b", "w").beat(Beat(run="1-00000000"), ttl_s=60)
    told = Inspector(connection).federation().problems
    assert told[0].startswith(
        "expert b is in Redis and not listed in fedmoe:experts: an aggregator that serves it lists"
    )
    with caplog.at_level(logging.WARNING):
        gateway.refresh()
    assert connection.client.hgetall("fedmoe:experts") == {b"a": b"1", b"b": b"1"}
    assert "expert b was missing from the list fedmoe:experts, this aggregator added it again" in caplog.text
    remove_expert(connection, "b")
    assert Inspector(connection).federation().problems == (
        "expert b was removed, and worker w ends at its next sync: nothing to do",
    )
    connection.client.hset("fedmoe:experts", "b", "1")
    assert gateway.refresh()
    assert connection.client.hkeys("fedmoe:experts") == [b"a"]
    assert Inspector(connection).federation().merged.built_from.keys() == {"a"}


def test_the_command_asks_and_says_what_it_did(connection: Connection) -> None:
    """Nobody to ask: exit 2. --yes: done. Then it is gone, and an unknown one is told from it."""
    make_expert(connection)
    arguments = ("expert", "remove", "--redis", connection.settings.url)
    asked = fedmoe(*arguments, "sql_expert")
    assert (asked.returncode, asked.stdout) == (2, "")
    assert "cannot ask whether to remove sql_expert (version 0, workers running: 0)" in asked.stderr
    assert "give --yes" in asked.stderr
    done = fedmoe_here(*arguments, "sql_expert", "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "removed sql_expert (version 0, workers running: 0)\n"
    again = fedmoe_here(*arguments, "sql_expert", "--yes")
    assert again.returncode == 1
    assert "fedmoe: expert 'sql_expert' was removed by an operator at " in again.stderr
    unknown = fedmoe_here(*arguments, "sqlexpert", "--yes")
    assert (unknown.returncode, unknown.stderr) == (
        2,
        "fedmoe: there is no expert 'sqlexpert'; there are: none\n",
    )
