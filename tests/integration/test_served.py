"""A worker whose expert nobody serves says so soon, in its log, its progress line and its heartbeat."""

from collections.abc import Callable

import pytest

from fedmoe.store.connection import Connection
from fedmoe.store.worker import WorkerStore
from producers import heartbeat, watch
from producers.watch import AggregatorWatch
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
    monkeypatch.setattr(watch, "LOOK_S", 0.05)
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


def test_two_looks_in_a_row_within_two_leases(connection: Connection) -> None:
    """A standby that takes over within a moment is no problem; nobody for longer than that is one."""
    store = WorkerStore(connection, "sql_expert", "alice")
    now = 0.0
    looking = AggregatorWatch(store, lambda: now)
    found = {}
    for now in (0.0, 1.0, 2.0, 4.0, 5.0, 6.0, 8.0):  # the clock
        if now == 2.0:
            connection.client.set(store.keys.lease, "somebody")
        if now == 4.0:
            connection.client.delete(store.keys.lease)
        found[now] = looking.look()
    assert found == {0.0: "", 1.0: "", 2.0: "", 4.0: "", 5.0: "", 6.0: PROBLEM, 8.0: PROBLEM}


def test_user_who_may_not_read_the_lease_is_left_in_peace(connection: Connection, connect: Connect) -> None:
    """An ACL that was written before: no warning, and no error."""
    acl = connection.client
    acl.execute_command("ACL", "SETUSER", "narrow", "on", ">secret", "~fedmoe:{sql_expert}:worker:*", "+@all")
    try:
        other = connect()
        other.client.execute_command("AUTH", "narrow", "secret")
        assert WorkerStore(other, "sql_expert", "alice").served()[0] is None
    finally:
        acl.execute_command("ACL", "DELUSER", "narrow")
