"""The inspector: all that happens is shown, all that is broken is said, nothing is written."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedmoe.cli.status import plain
from fedmoe.protocol.federation import findings
from fedmoe.protocol.records import HEARTBEAT_TTL_S, TRACE_TTL_S
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.inspect import REPAIR
from fedmoe.store.worker import WorkerStore
from tests.federation import ScriptedWorker, make_expert, serve, serving, small_spec
from tests.looking import BEAT, build_gateway, hold, look, some_updates
from tests.processes import eventually, fedmoe


def test_all_that_happened_is_shown(connection: Connection) -> None:
    """Two updates applied, one refused, one waiting, two workers, a gateway of an older version."""
    some_updates(connection)

    seen = look(connection)
    (shown,) = seen.experts
    assert shown.meta is not None
    assert (shown.meta.version, shown.meta.refused, shown.meta.mean_staleness) == (2, 1, 0.5)
    assert (shown.waiting, shown.pending, shown.lag) == (1, 0, 1)
    assert (shown.lease, [gone.name for gone in shown.left], shown.dead) == ("agg-1", ["bob"], 1)
    assert "norm" in shown.last_dead[0].reason
    assert [line["worker"] for line in shown.log] == ["bob", "alice"]
    (worker,) = shown.workers
    assert (worker.name, worker.host, worker.step, worker.loss) == ("alice", "lab", 12, 1.25)
    assert (worker.base_version, worker.behind) == (1, 1)
    assert worker.last_seen_s == pytest.approx(4.0, abs=1.0)
    assert seen.merged.exists
    assert (seen.merged.built_from, seen.merged.present) == ({"sql_expert": 1}, {"sql_expert": 2})
    assert seen.merged.outdated == ("sql_expert",)
    assert seen.server.used_memory
    (finding,) = findings(seen)
    assert finding.startswith("sql_expert: 1 update refused; the last: alice update 2: its")


def test_entries_that_were_read_and_not_committed_are_pending(connection: Connection) -> None:
    """What an aggregator that died had in hand is told from what nobody has read."""
    expert = make_expert(connection)
    ScriptedWorker(connection, small_spec()).push(0.5)
    assert expert.store.read(block_ms=1, count=1)
    ScriptedWorker(connection, small_spec(), "bob").push(0.5)
    (shown,) = look(connection).experts
    assert (shown.waiting, shown.pending, shown.lag) == (2, 1, 1)
    _, (unread, _) = connection.client.xrange("fedmoe:{sql_expert}:updates")
    connection.client.xdel("fedmoe:{sql_expert}:updates", unread)
    (shown,) = look(connection).experts
    assert (shown.waiting, shown.pending, shown.lag) == (1, 1, 0)  # Redis now says lag None


def test_waiting_updates_that_nobody_serves_are_said(connection: Connection) -> None:
    """No lease is wrong, and worse while updates wait or the gateway is behind; with a lease all is well."""
    expert = make_expert(connection)
    nobody = "sql_expert: no aggregator serves it: start `fedmoe aggregator run`"
    assert list(findings(look(connection))) == [nobody]
    build_gateway(connection)
    ScriptedWorker(connection, small_spec()).push(0.5)
    waiting = "sql_expert: 1 entry waiting and no aggregator serves it: start `fedmoe aggregator run`"
    assert list(findings(look(connection))) == [waiting]
    serve(expert)
    stale = "merged gateway: sql_expert moved on and no aggregator rebuilds it: start `fedmoe aggregator run`"
    assert list(findings(look(connection))) == [nobody, stale]
    ScriptedWorker(connection, small_spec()).push(0.5)
    assert list(findings(look(connection))) == [waiting, stale]
    hold(connection)
    assert list(findings(look(connection))) == []


def test_what_is_broken_is_said_for_its_expert_and_the_rest_is_shown(connection: Connection) -> None:
    """Missing, half missing, malformed and foreign keys: a sentence each, and the healthy expert as ever."""
    for name in ("a", "b", "c", "d", "e"):
        make_expert(connection, name)
    client = connection.client
    client.delete("fedmoe:{b}:meta", "fedmoe:{b}:weights", "fedmoe:{b}:updates")
    client.hdel("fedmoe:{c}:meta", "version")
    client.delete("fedmoe:{d}:updates", "fedmoe:{d}:weights", "fedmoe:{d}:worker:x")
    client.set("fedmoe:{d}:updates", "text")
    client.hset("fedmoe:{d}:weights", "a", "b")
    client.set("fedmoe:{d}:decided", "text")
    client.set("fedmoe:{d}:worker:x", "text")
    client.hset("fedmoe:{e}:meta", "version", "many")
    client.hset("fedmoe:experts", mapping={"f:*": "1", "merged": "1", "e": "heavy"})
    client.hset("fedmoe:{merged}:meta", mapping={"built_from": "[1]"})

    seen = look(connection)
    a, b, _, d, _ = seen.experts
    assert (a.problems, a.meta and a.meta.version) == ((), 0)
    assert b.problems == (f"its meta is missing: {REPAIR}", f"its weights are missing: {REPAIR}")
    assert (b.waiting, b.pending, b.lag) == (0, 0, 0)
    assert d.problems == (
        "weights, updates, decided cannot be read: the key is of the wrong type: was it written by something else?",
    )
    said = "\n".join(findings(seen))
    for sentence in (
        "c: the expert's meta hash is malformed (KeyError('version'))",
        "e: the expert's meta hash is malformed (ValueError(",
        "d: the heartbeat of x cannot be read: the key is of the wrong type",
        "e: its gateway weight is 'heavy', not a number",
        "fedmoe:experts lists 'f:*', which is not an expert's name",
        "fedmoe:experts lists 'merged', which is not an expert's name",
        "merged gateway: its meta is malformed",
    ):
        assert sentence in said
    done = fedmoe("status", "--redis", connection.settings.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert "d: the heartbeat of x" in done.stdout


def test_part_that_is_gone_is_said_before_anybody_loads_it(connection: Connection) -> None:
    """Spec and decided updates, beside weights and meta; an expert without any update has none decided."""
    expert = make_expert(connection)
    assert look(connection).experts[0].problems == ()
    ScriptedWorker(connection, expert.spec).push(1.0)
    serve(expert)
    assert look(connection).experts[0].problems == ()
    connection.client.delete(expert.store.keys.spec, expert.store.keys.decided)
    assert look(connection).experts[0].problems == (
        f"its spec is missing: {REPAIR}", f"its decided updates are missing: {REPAIR}",
    )  # fmt: skip


def test_the_experts_key_itself_may_be_foreign(connection: Connection) -> None:
    """Then there is nothing to show but that."""
    connection.client.set("fedmoe:experts", "text")
    assert list(findings(look(connection))) == [
        "fedmoe:experts is not a hash: was it written by something else?"
    ]


@pytest.fixture
def viewer_url(connection: Connection) -> Iterator[str]:
    """A user who may look at everything but payloads and weights, and change nothing."""
    command = ("ACL", "SETUSER", "viewer", "on", ">pw", "resetkeys", "%R~fedmoe:*", "-@all", "+@read", "-get",
               "-getrange", "-dump", "+info", "+auth", "+hello", "+select")  # fmt: skip
    connection.client.execute_command(*command)
    yield connection.settings.url.replace("unix://", "unix://viewer:pw@")
    connection.client.execute_command("ACL", "DELUSER", "viewer")


def test_a_read_only_user_sees_it_all_but_who_holds_the_lease(
    connection: Connection, viewer_url: str
) -> None:
    """No problem is reported, and what needs a name only says that there is one."""
    expert = make_expert(connection)
    ScriptedWorker(connection, small_spec()).push(0.5)
    serve(expert)
    WorkerStore(connection, "sql_expert", "alice").beat(BEAT, ttl_s=10)
    hold(connection)
    build_gateway(connection)
    mine, theirs = look(connection), look(Connection(RedisSettings(url=viewer_url)))
    assert list(findings(theirs)) == []
    assert theirs.experts[0].lease == "?"
    shown = replace(theirs.experts[0], lease="agg-1", workers=mine.experts[0].workers)
    assert replace(shown, last_update_s=mine.experts[0].last_update_s) == mine.experts[0]
    assert replace(theirs.merged, lease="agg-1") == mine.merged
    assert len(theirs.workers) == 1


def test_what_a_user_may_not_read_is_said_in_one_line(connection: Connection, viewer_url: str) -> None:
    """A worker's own user, say, sees its expert's meta and little else."""
    make_expert(connection)
    allowed = ("+hgetall", "%R~fedmoe:experts", "%R~fedmoe:{sql_expert}:meta")
    connection.client.execute_command("ACL", "SETUSER", "viewer", "resetkeys", "-@all", "+auth", *allowed)
    seen = look(Connection(RedisSettings(url=viewer_url)))
    (shown,) = seen.experts
    assert shown.meta is not None
    assert shown.problems == (
        "weights, lease, problem, updates, dead, log, decided, spec cannot be read: this user may not",
    )
    assert seen.problems == ("the workers cannot be read: this user may not SCAN",)
    assert not seen.sees_workers
    assert not seen.merged.is_known
    assert shown.left == ()
    assert (
        list(findings(seen))[-1]
        == "merged gateway: meta, weights, lease, problem, fit cannot be read: this user may not"
    )


def test_looking_changes_nothing(connection: Connection) -> None:
    """Not even a consumer group, nor an expiry."""
    make_expert(connection)
    connection.client.delete("fedmoe:{sql_expert}:updates")
    before = {key: connection.client.dump(key) for key in connection.client.scan_iter()}
    assert fedmoe("status", "--redis", connection.settings.url).returncode == 0
    assert {key: connection.client.dump(key) for key in connection.client.scan_iter()} == before


def test_a_server_that_runs_full_is_said(connection: Connection) -> None:
    """Above 80 % of maxmemory, and whenever it may throw keys away."""
    make_expert(connection)
    hold(connection)
    # Made by the server itself, so that no connection's buffer counts; beside it, what connections need is little.
    connection.client.setrange("ballast", 32 * 1024 * 1024, "x")
    used = connection.client.info("memory")["used_memory"]
    connection.client.config_set("maxmemory", used * 2)
    try:
        assert list(findings(look(connection))) == []
        connection.client.config_set("maxmemory", int(used * 1.1))
        connection.client.config_set("maxmemory-policy", "allkeys-lru")
        full, evicts = findings(look(connection))
    finally:
        connection.client.config_set("maxmemory-policy", "noeviction")
        connection.client.config_set("maxmemory", 0)
    assert full.startswith("Redis: 9")
    assert "allkeys-lru" in evicts


def test_a_worker_that_fell_silent_is_said(connection: Connection) -> None:
    """Two missed heartbeats."""
    expert = make_expert(connection)
    hold(connection)
    expert.store.connection.client.hset("fedmoe:{sql_expert}:worker:al", "run", "1-00000000")
    expert.store.connection.client.pexpire("fedmoe:{sql_expert}:worker:al", 3000)
    assert list(findings(look(connection))) == ["sql_expert: worker al has not been heard of for 12 s"]


def test_how_and_when_each_worker_left_is_shown(connection: Connection) -> None:
    """Finished, refused, killed, one of an earlier FedMoE without a trace, and one that came back after it had left."""
    make_expert(connection)
    hold(connection)
    client = connection.client
    workers = {name: WorkerStore(connection, "sql_expert", name) for name in ("ann", "bob", "cleo", "eve")}
    for store in workers.values():
        store.beat(BEAT, ttl_s=HEARTBEAT_TTL_S)
    workers["ann"].leave("finished")
    workers["bob"].leave("refused", "its base model is another one")
    client.delete("fedmoe:{sql_expert}:worker:cleo")  # killed: the heartbeat expires
    client.pexpire("fedmoe:{sql_expert}:payload:cleo:trace", int((TRACE_TTL_S - 300) * 1000))
    client.hset("fedmoe:{sql_expert}:decided", "dan", "{}")
    workers["eve"].leave("failed", "no memory")
    workers["eve"].beat(BEAT, ttl_s=HEARTBEAT_TTL_S)
    seen = look(connection)
    (shown,) = seen.experts
    assert [worker.name for worker in shown.workers] == ["eve"]
    assert [(gone.name, gone.how) for gone in shown.left] == [
        ("ann", "finished"), ("bob", "refused"), ("cleo", "vanished"), ("dan", ""),
    ]  # fmt: skip
    again = "if it was killed and not revoked, start it again with the same command"
    assert list(findings(seen)) == [
        "sql_expert: worker bob was refused and ended 0 s ago: its base model is another one",
        f"sql_expert: worker cleo stopped sending heartbeats 5 min ago (host lab): {again}",
    ]
    text = fedmoe("status", "--redis", connection.settings.url).stdout
    assert "ann (sql_expert) finished " in text
    assert "cleo (sql_expert) vanished 5 min ago, dan (sql_expert)" in text


def test_an_expert_that_stands_still_is_said(connection: Connection) -> None:
    """The age of the last update is a column, and a finding when workers run."""
    make_expert(connection)
    hold(connection)
    seconds, micros = connection.client.time()
    yesterday = int((seconds - 26 * 3600) * 1000 + micros / 1000)
    log = "fedmoe:{sql_expert}:log"
    connection.client.xadd(log, {"version": 1, "worker": "ann"}, id=f"{yesterday}-0")
    connection.client.xadd(log, {"version": 1, "restored": "written back"})
    assert list(findings(look(connection))) == []
    assert look(connection).experts[0].last_update_s == pytest.approx(26 * 3600, abs=60)
    assert "26 h" in fedmoe("status", "--redis", connection.settings.url).stdout
    WorkerStore(connection, "sql_expert", "ann").beat(BEAT, ttl_s=HEARTBEAT_TTL_S)
    (finding,) = findings(look(connection))
    assert finding.startswith("sql_expert: the last update was applied 26 h ago, although 1 worker runs")


def test_what_an_aggregator_cannot_do_is_shown_and_goes_when_it_can(
    connection: Connection, connect: Callable[[], Connection], tmp_path: Path
) -> None:
    """A --keep-updates directory that takes nothing: said in status as long as it lasts; a dead one's word expires."""
    make_expert(connection)
    kept = tmp_path / "kept"
    with serving(connect(), "agg-1", keep_updates=kept):
        eventually("the expert is served", lambda: look(connection).experts[0].lease == "agg-1")
        shutil.rmtree(kept / "sql_expert")
        (kept / "sql_expert").write_text("in the way")
        ScriptedWorker(connection, small_spec()).push(0.5)
        said = eventually("the problem is shown", lambda: look(connection).experts[0].problems)
        assert said[0].startswith("aggregator agg-1 has a problem: updates cannot be kept in ")
        assert 0 < connection.client.pttl("fedmoe:{sql_expert}:problem") <= 60_000
        (kept / "sql_expert").unlink()
        (kept / "sql_expert").mkdir()
        eventually(
            "the update is applied", lambda: (meta := look(connection).experts[0].meta) and meta.version
        )
        eventually("the problem is gone", lambda: not look(connection).experts[0].problems)


def test_an_adapter_that_reaches_little_is_shown(connection: Connection) -> None:
    """Of a mixture of experts, for example; not one that reaches nearly all, or of which nobody knows."""
    make_expert(connection, "a", reach=0.23, not_reached="mlp.experts.gate_up_proj (50%)")
    make_expert(connection, "b", reach=0.99)
    make_expert(connection, "c")
    shown = plain(look(connection))
    assert (
        "a: its adapter covers 23% of the weights, embeddings not counted; not covered: mlp.experts.gate_up_proj "
        "(50%); the rest of the base model is not trained" in shown
    )
    assert shown.count("its adapter covers") == 1
