"""The daemon as it runs: leases, standby, death, burst, and an expert whose state somebody broke."""

import threading
import time
from collections.abc import Callable

import pytest
import torch

from consumers.aggregator import ExpertServer
from consumers.daemon import Aggregator
from consumers.expert import Expert
from fedmoe.errors import SettingsError, SpecError
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.settings import AggregatorSettings, GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.lease import Lease
from tests.errors import raises
from tests.federation import LAYOUT, ScriptedWorker, make_expert, serving, small_spec
from tests.processes import eventually

Connect = Callable[[], Connection]


def test_waiting_and_new_updates_are_served(connection: Connection, connect: Connect) -> None:
    """What waited before the daemon came, and what comes while it runs."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    worker.push(1.0)
    with serving(connect(), "one"):
        eventually("version 1", lambda: expert.store.load().meta.version == 1)
        worker.pull()
        worker.push(1.0)
        eventually("version 2", lambda: expert.store.load().meta.version == 2)


def test_standby_takes_over(connection: Connection, connect: Connect) -> None:
    """A second aggregator serves within the lease's expiry after the first one died."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    with serving(connect(), "heir"):
        pass  # it gave its lease up
    with serving(connect(), "first", release=False):
        eventually("the lease", lambda: connection.client.get(expert.store.keys.lease) == b"first")
        with serving(connect(), "second") as (_, standby):
            time.sleep(0.3)
            assert connection.client.get(expert.store.keys.lease) == b"first"
            assert standby.is_alive()
    with serving(connect(), "third"):
        worker.push(1.0)
        assert connection.client.pttl(expert.store.keys.lease) <= 1000
        eventually("version 1", lambda: expert.store.load().meta.version == 1)


def test_burst_ends_when_nothing_waits(connection: Connection, connect: Connect) -> None:
    """--burst decides what is there and ends."""
    expert = make_expert(connection)
    for name in ("alice", "bob", "carol"):
        ScriptedWorker(connection, expert.spec, name).push(1.0)
    with serving(connect(), "one", burst=True) as (_, thread):
        thread.join(10)
        assert not thread.is_alive()
    assert expert.store.load().meta.version == 3
    assert connection.client.get(expert.store.keys.lease) is None


def test_lost_connections_cost_nothing(connection: Connection, connect: Connect) -> None:
    """Connections cut again and again while updates flow: each is applied once."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    with serving(connect(), "one"):
        for number in range(1, 9):
            worker.push(1.0)
            connection.client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
            eventually("the decision", lambda n=number: expert.store.load().meta.version == n)
            worker.pull()
    buffer = AdapterBuffer(LAYOUT)
    buffer.load(expert.store.load().weights)
    assert torch.equal(buffer.flat, torch.arange(LAYOUT.numel) + 8)


def test_overwritten_key_stops_only_its_expert(connection: Connection, connect: Connect) -> None:
    """A weights key that somebody overwrote is said, and served again once it is repaired."""
    expert = make_expert(connection)
    good = connection.client.get(expert.store.keys.weights)
    connection.client.set(expert.store.keys.weights, b"oops")
    with raises(SpecError, about="weights"):
        ScriptedWorker(connection, expert.spec)
    with serving(connect(), "one") as (_, thread):
        time.sleep(0.3)
        assert thread.is_alive()
        connection.client.set(expert.store.keys.weights, good)
        ScriptedWorker(connection, expert.spec).push(1.0)
        eventually("version 1", lambda: expert.store.load().meta.version == 1)


def test_whole_daemon_builds_the_gateway(connection: Connection, connect: Connect, redis_url: str) -> None:
    """Experts in their threads, the gateway rebuilt when one moves and not when none does."""
    from fedmoe.settings import RedisSettings

    spec = small_spec()
    experts = {name: make_expert(connection, name, spec) for name in ("a", "b")}
    daemon = Aggregator(
        RedisSettings(url=redis_url), ["a", "b"], AggregatorSettings(block_ms=50, lease_s=1.0),
        GatewaySettings(interval_s=0.1), holder="one",
    )  # fmt: skip
    stop = threading.Event()
    thread = threading.Thread(target=daemon.run, args=(stop,))
    thread.start()
    store = GatewayStore(connect())
    try:
        first = eventually("a first gateway", store.load_merged)
        time.sleep(0.4)
        assert store.load_merged() == first
        ScriptedWorker(connection, spec, "w", "a").push(1.0)
        eventually("a second one", lambda: store.merged().experts["a"].version == 1)
        commit = experts["a"].store.load().meta.weights_commit
        assert store.merged().experts["a"].weights_commit == commit
    finally:
        stop.set()
        thread.join()
    assert store.merged().rank == 4


@pytest.mark.parametrize(
    "wrong",
    [{"lease_s": 0.0}, {"block_ms": 0}, {"block_ms": 5000}, {"batch": 0}, {"lease_s": 0.5, "block_ms": 400}],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    """Relations between settings are checked where they are made, with the reason."""
    with pytest.raises(SettingsError):
        AggregatorSettings(**wrong)


def test_lease_has_one_holder(connection: Connection, connect: Connect) -> None:
    """Only its holder renews and releases a lease; another one waits for the expiry."""
    first = Lease(connection, "l", holder="first", ttl_ms=300)
    second = Lease(connect(), "l", holder="second", ttl_ms=300)
    assert first.hold()
    assert not second.hold()
    second.release()
    assert first.hold()
    assert not second.hold()
    eventually("the expiry", second.hold, timeout_s=2)
    assert not first.hold()


def test_lease_is_renewed_once_in_a_quarter_of_its_time(connection: Connection) -> None:
    """A holder that asks at each read costs Redis three commands each time; one in doubt asks at once."""
    now = 0.0
    lease = Lease(connection, "l", holder="first", ttl_ms=4000, clock=lambda: now)

    def asks() -> bool:
        connection.client.delete("l")
        assert lease.hold()
        return bool(connection.client.exists("l"))

    assert asks()
    for then, due in ((0.9, False), (1.1, True), (2.0, False)):
        now = then
        assert asks() is due
    lease.doubt()
    assert asks()
    connection.client.set("l", "second")
    now += 1.1
    assert not lease.hold()
    connection.client.delete("l")
    assert asks()


def test_more_notices_a_blocked_stream_and_does_not_outstay_the_lease(connection: Connection) -> None:
    """What comes while a batch is folded: at most so many entries, and for a quarter of the lease."""
    expert = make_expert(connection)
    now = 100.0
    server = ExpertServer(
        connection, "sql_expert", AggregatorSettings(lease_s=4.0), holder="h", clock=lambda: now
    )
    server.reclaimed_at = now
    key = expert.store.keys.updates
    for number in range(3):
        connection.client.xadd(key, {"junk": number})
    more = server.more(2)
    assert len(more()) == 2
    assert not more()
    assert not server.is_time_to_reclaim()
    connection.client.xadd(key, {"junk": 3}, id=f"{2**64 - 1}-{2**64 - 1}")
    assert len(server.more(9)()) == 2
    assert server.is_time_to_reclaim()
    late = server.more(9)
    now += 1.1
    assert not late()


def test_long_batch_keeps_its_lease(connection: Connection) -> None:
    """Between two updates the lease is renewed in time; if somebody else has it, the first commit counts."""
    make_expert(connection)
    ttl, now, keys = 4000, 100.0, connection.keys.expert("sql_expert")
    server = ExpertServer(
        connection,
        "sql_expert",
        AggregatorSettings(lease_s=ttl / 1000, burst=True),
        holder="h",
        clock=lambda: now,
    )
    workers = [ScriptedWorker(connection, small_spec(), name) for name in ("a", "b", "c")]
    for worker in workers:
        worker.push(1.0)
    stop, decide, left = threading.Event(), Expert.decide, []

    def slowly(self: Expert, *rest: object) -> object:
        nonlocal now
        now += 1.5
        left.append(connection.client.pttl(keys.lease))
        if len(left) >= 3 and thief:
            connection.client.set(keys.lease, "thief", px=60_000)
        else:
            connection.client.pexpire(keys.lease, 10)  # as good as over
        return decide(self, *rest)

    thief = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Expert, "decide", slowly)
        server.turn(stop)
        assert connection.client.hget(keys.meta, "version") == b"3"
        assert min(left[1:]) > ttl / 2
        for worker in workers:
            worker.pull()
            worker.push(1.0)
        workers[0].publish()
        left.clear()
        thief = True
        server.turn(stop)
    assert connection.client.hget(keys.meta, "version") == b"6"
    assert connection.client.get(keys.lease) == b"thief"
    server.turn(stop)
    assert not server.is_serving
