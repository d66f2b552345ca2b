"""An aggregator that cannot keep up with an expert sees it by its own clock, and nobody can make it believe so."""

import threading
from collections.abc import Callable

import pytest

from consumers.aggregator import ExpertServer
from consumers.expert import Expert
from consumers.rebalance import Rebalancer
from fedmoe.settings import AggregatorSettings
from fedmoe.store.connection import Connection
from tests.federation import ScriptedWorker, make_expert, small_spec

pytestmark = pytest.mark.one_server

LEASE_S = 4.0
Connect = Callable[[], Connection]


class Clock:
    """The time that the aggregator sees, in seconds; it passes only where a test says so."""

    now = 100.0

    def __call__(self) -> float:
        """The present time."""
        return self.now


class Aggregator:
    """One that serves `sql_expert`, turn by turn."""

    def __init__(self, connection: Connection, heartbeats: Connection, batch: int) -> None:
        self.clock = Clock()
        self._rebalancer = Rebalancer(heartbeats, "one", lease_s=LEASE_S, clock=self.clock)
        settings = AggregatorSettings(lease_s=LEASE_S, block_ms=1, batch=batch)
        self._server = ExpertServer(
            connection, "sql_expert", settings, holder="one", rebalancer=self._rebalancer, clock=self.clock
        )
        self._rebalancer.beat()
        self.turn()

    def turn(self) -> None:
        """Read once and commit."""
        self._server.turn(threading.Event())

    @property
    def is_overdue(self) -> bool:
        """True if its heartbeat says that it is too slow, once it has renewed the lease that it let expire."""
        self._server.lease.renew()
        return "sql_expert" in self._rebalancer.assignment.present(self.clock.now).overdue


@pytest.fixture
def expert(connection: Connection) -> Expert:
    """Whose workers sync every ten seconds."""
    return make_expert(connection)


@pytest.fixture
def start(expert: Expert, connection: Connection, connect: Connect) -> Callable[..., Aggregator]:
    """Starts an aggregator that has served the idle expert for an hour."""

    def start(batch: int = 64) -> Aggregator:
        one = Aggregator(connection, connect(), batch)
        one.clock.now += 3600
        one.turn()
        return one

    return start


def slowly(monkeypatch: pytest.MonkeyPatch, clock: Clock, name: str, takes_s: float) -> None:
    """Each call of that method of Expert takes so long."""
    usual = getattr(Expert, name)

    def method(self: Expert, *rest: object) -> object:
        clock.now += takes_s
        return usual(self, *rest)

    monkeypatch.setattr(Expert, name, method)


def test_an_entry_with_an_old_id_has_not_waited(
    start: Callable[..., Aggregator], expert: Expert, connection: Connection
) -> None:
    """A worker may choose the id, and so the time, of its entry: it counts from when it can have come."""
    worker, key = ScriptedWorker(connection, expert.spec), expert.store.keys.updates
    one = start()
    worker.train(1.0)
    worker.make_update()
    entry = worker.publish()
    ((_, fields),) = connection.client.xrange(key, entry, entry)
    connection.client.xdel(key, entry)
    connection.client.execute_command("XSETID", key, "0-0")
    connection.client.xadd(key, fields, id="1-1")
    one.turn()
    assert connection.client.hget(expert.store.keys.meta, "version") == b"1"
    assert not one.is_overdue


def test_a_slow_batch_is_overdue(
    start: Callable[..., Aggregator], expert: Expert, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read 40 s ago is decided only now."""
    one = start()
    for name in ("alice", "bob"):
        ScriptedWorker(connection, expert.spec, name).push(1.0)
    slowly(monkeypatch, one.clock, "decide", 20.0)
    one.turn()
    assert one.is_overdue


def test_a_stream_that_is_never_emptied_is_overdue(
    start: Callable[..., Aggregator], expert: Expert, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch is short, and the last one has waited for all of them; a minute of nothing to do is no waiting."""
    one = start(batch=1)
    for name in ("alice", "bob", "carol", "dan"):
        ScriptedWorker(connection, expert.spec, name).push(1.0)
    slowly(monkeypatch, one.clock, "decide", 9.0)
    one.clock.now += 0.5  # since they came, and since the last read
    found = []
    for _ in range(4):
        one.turn()
        found.append(one.is_overdue)
    assert found == [False, False, False, True]


def test_garbage_is_never_overdue(
    start: Callable[..., Aggregator], expert: Expert, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker waits for it."""
    one = start()
    connection.client.xadd(expert.store.keys.updates, {"junk": 1})
    slowly(monkeypatch, one.clock, "_garbage", 60.0)
    one.turn()
    assert connection.client.hget(expert.store.keys.meta, "garbage") == b"1"
    assert not one.is_overdue


def test_what_waited_for_another_aggregator_does_not_count(
    expert: Expert, connection: Connection, connect: Connect
) -> None:
    """An aggregator that takes an expert over is not slow because nobody served it before."""
    ScriptedWorker(connection, small_spec()).push(1.0)
    one = Aggregator(connection, connect(), batch=64)
    assert connection.client.hget(expert.store.keys.meta, "version") == b"1"
    assert not one.is_overdue
