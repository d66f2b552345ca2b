"""A worker whose expert nobody serves says so soon, in its log, its progress line and its heartbeat."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from fedmoe.errors import RedisUnavailableError
from fedmoe.protocol.beat import Beat
from fedmoe.protocol.records import TRACE_TTL_S
from fedmoe.protocol.rollback import RolledBack
from fedmoe.store.connection import Connection
from fedmoe.store.worker import WorkerStore
from producers import heartbeat, watch
from producers.watch import AggregatorWatch
from tests.errors import raises
from tests.federation import make_expert, serving
from tests.integration.test_sync import RULES, SPEC, Run
from tests.processes import eventually

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]
PROBLEM = (
    "no aggregator serves expert 'sql_expert': start `fedmoe aggregator run`; until then no update is applied"
)


def test_said_in_log_status_and_heartbeat(
    connection: Connection,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While nobody serves it, and no longer once somebody does; nothing that was trained meanwhile is lost."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_INTERVAL_S", 0.1)
    expert = make_expert(connection, spec=SPEC, rules=RULES)
    run = Run(connect())
    key = expert.store.keys.worker("alice")

    def told() -> bool:
        run.train(1)
        return bool(connection.client.hget(key, "problem") == PROBLEM.encode())

    eventually("the problem in the heartbeat", told)
    assert run.sync.status.problem == PROBLEM
    with serving(connect(), block_ms=20):
        eventually(
            "no problem in the heartbeat",
            lambda: run.train(1) or connection.client.hget(key, "problem") in (None, b""),
        )
        run.finish(15.0)
    assert expert.store.load().meta.n_examples == run.steps
    lines = [record.getMessage() for record in caplog.records if record.name == "producers.watch"]
    assert lines == [f"{PROBLEM} (training goes on)", "an aggregator serves expert 'sql_expert' again"]


def test_two_looks_in_a_row(connection: Connection) -> None:
    """A standby that takes over within a moment is no problem; nobody for longer than that is one."""
    store = WorkerStore(connection, "sql_expert", "alice")
    sooner: list[float] = []
    looking = AggregatorWatch(store, sooner.append)
    found = []
    for then in ("", "somebody", "", "", "", "somebody"):
        connection.client.delete(store.keys.lease)
        if then:
            connection.client.set(store.keys.lease, then)
        store.beat(Beat(run="1-00000000"), ttl_s=15)
        found.append(looking.look())
        assert looking.look() == found[-1]  # it is not one more look
    assert found == ["", "", "", PROBLEM, PROBLEM, ""]
    assert sooner == [watch.LOOK_S] * 2


def test_user_who_may_not_read_the_lease_is_left_in_peace(connection: Connection, connect: Connect) -> None:
    """An ACL that was written before: no warning, and no error."""
    acl = connection.client
    keys = ("~fedmoe:{sql_expert}:worker:*", "~fedmoe:{sql_expert}:payload:*")
    acl.execute_command("ACL", "SETUSER", "narrow", "on", ">secret", *keys, "+@all")
    try:
        other = connect()
        other.client.execute_command("AUTH", "narrow", "secret")
        store = WorkerStore(other, "sql_expert", "alice")
        for _ in range(2):
            store.beat(Beat(run="1-00000000"), ttl_s=15)
            assert store.seen
            assert store.seen.is_served is store.seen.orders is None
    finally:
        acl.execute_command("ACL", "DELUSER", "narrow")


def test_a_heartbeat_is_five_commands(connection: Connection) -> None:
    """An idle worker sends nothing else: no look for an aggregator, and none for new rules."""
    make_expert(connection)
    store = WorkerStore(connection, "sql_expert", "alice")
    beat = Beat(run="1-00000000", host="lab", problem="a full disk", loss=2.5)
    store.beat(beat, ttl_s=15)
    before = connection.client.info("stats")["total_commands_processed"]
    store.beat(replace(beat, beat="2", problem="", loss=None), ttl_s=15)
    assert connection.client.info("stats")["total_commands_processed"] - before == 5 + 1  # that INFO, too
    assert store.heartbeat() == replace(beat, beat="2", problem="", loss=None)
    assert store.seen
    assert store.seen.orders == (store.meta().rules, RolledBack())


@pytest.mark.parametrize("gone", ["worker", "payload", "both", "wrong type"])
def test_a_lost_heartbeat_is_written_anew(connection: Connection, gone: str) -> None:
    """Redis was emptied, the worker slept, or somebody overwrote the key: both are there again, and expire."""
    store = WorkerStore(connection, "sql_expert", "alice")
    key, trace = store.keys.worker("alice"), store.keys.trace("alice")
    beat = Beat(run="1-00000000", host="lab")
    store.beat(beat, ttl_s=15)
    if gone == "wrong type":
        connection.client.set(key, "somebody's")
    connection.client.delete(*{"worker": [key], "payload": [trace], "both": [key, trace]}.get(gone, ["none"]))
    store.beat(beat, ttl_s=15)
    assert store.heartbeat() == beat
    assert connection.client.hgetall(trace) == {b"host": b"lab"}
    assert 14_000 < connection.client.pttl(key) <= 15_000
    assert connection.client.pttl(trace) > (TRACE_TTL_S - 1) * 1000


def test_who_left_and_comes_back_has_not_left(connection: Connection) -> None:
    """The trace of how it left goes with the first heartbeat."""
    store = WorkerStore(connection, "sql_expert", "alice")
    for _ in range(2):
        store.beat(Beat(run="1-00000000", host="lab"), ttl_s=15)
        assert connection.client.hgetall(store.keys.trace("alice")) == {b"host": b"lab"}
        store.leave("failed", "no memory")
        assert store.heartbeat() is None


def test_a_full_redis_refuses_the_heartbeat_and_answers_it(connection: Connection) -> None:
    """Only an aggregator frees its memory, so a worker still says that there is none."""
    store = WorkerStore(connection, "sql_expert", "alice")
    store.beat(Beat(run="1-00000000"), ttl_s=15)
    before, limit = store.seen, connection.client.config_get("maxmemory")["maxmemory"]
    connection.client.config_set("maxmemory", "1")
    try:
        with raises(RedisUnavailableError, about="maxmemory"):
            store.beat(Beat(run="1-00000000"), ttl_s=15)
    finally:
        connection.client.config_set("maxmemory", limit)
    assert store.seen is not before
    assert store.seen
    assert store.seen.is_served is False
