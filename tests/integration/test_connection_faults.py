"""Connections that break at the worst moment, by a real proxy: every step counts once, and nothing is left over."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fedmoe.errors import RedisUnavailableError
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.settings import RedisSettings
from fedmoe.store.backup import BackupStore
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.expert import ExpertStore
from fedmoe.tools.backup import Backup, restore
from tests.backups import backed_up
from tests.counting import EXPERT, CountingWorker, assert_settled, counting_spec, create_expert
from tests.errors import raises
from tests.federation import first_meta, serving
from tests.processes import eventually
from tests.proxy import Action, Direction, Proxy

Reach = Callable[[str], Connection]


@pytest.fixture
def reach() -> Iterator[Reach]:
    """Make connections to a URL, with the shortest timeout there may be; all are closed at the end."""
    with ExitStack() as made:

        def make(url: str) -> Connection:
            connection = Connection(RedisSettings(url=url, timeout_s=2.0))
            made.callback(connection.close)
            return connection

        yield make


@pytest.fixture
def near(server: EmbeddedRedis, connection: Connection) -> Iterator[dict[str, Proxy]]:
    """One proxy before the worker, one before the aggregator; the database behind is empty."""
    with Proxy(server.socket) as worker, Proxy(server.socket) as aggregator:
        yield {"worker": worker, "aggregator": aggregator}


def more(store: ExpertStore, n: int) -> None:
    """Wait for n more versions."""
    begin = store.load().meta.version
    eventually(f"{n} more updates", lambda: store.load().meta.version >= begin + n, timeout_s=20)


@contextmanager
def frozen(*proxies: Proxy) -> Iterator[None]:
    """No byte goes through."""
    for proxy in proxies:
        proxy.freeze()
    try:
        yield
    finally:
        for proxy in proxies:
            proxy.thaw()


@pytest.mark.parametrize("action", ["cut_before", "cut_in_middle", "cut_after", "late"])
@pytest.mark.parametrize(
    ("whose", "command"),
    [("aggregator", b"EXEC"), ("aggregator", b"XREADGROUP"), ("worker", b"XADD"), ("worker", b"SET")],
)
def test_connection_breaks_at_a_command(
    connection: Connection, reach: Reach, near: dict[str, Proxy], tmp_path: Path,
    whose: str, command: bytes, action: Action,
) -> None:  # fmt: skip
    """A commit, a read, a publication: never executed, executed in part, with its reply lost, or much later."""
    spec = counting_spec()
    store = create_expert(connection, spec)
    with (
        serving(reach(near["aggregator"].url), keep_updates=tmp_path),
        CountingWorker(reach(near["worker"].url), spec) as worker,
    ):
        more(store, 2)
        fired = near[whose].on(command, action)
        assert fired.wait(5)
        more(store, 3)
        if action == "late":  # or it might come when nobody serves any more
            eventually("the late command", lambda: near[whose].hits["arrived"] == 1, timeout_s=5)
        worker.finish()
    assert near[whose].hits[action] == 1
    # Header and part, if they are written when their update has been decided already.
    leftovers = 2 if (command, action) == (b"SET", "late") else 0
    assert_settled(connection, spec, [worker], tmp_path, leftovers=leftovers)


def test_lost_reply_of_a_publication_makes_a_duplicate(
    connection: Connection, reach: Reach, near: dict[str, Proxy], tmp_path: Path
) -> None:
    """The worker publishes again while its first entry waits: one of the two counts."""
    spec = counting_spec()
    store = create_expert(connection, spec)
    fired = near["worker"].on(b"XADD", "cut_after")
    with CountingWorker(reach(near["worker"].url), spec) as worker:
        assert fired.wait(5)
        eventually("a second entry", lambda: connection.client.xlen(store.keys.updates) == 2, timeout_s=5)
        with serving(reach(near["aggregator"].url), keep_updates=tmp_path):
            more(store, 3)
            worker.finish()
    assert store.load().meta.duplicate == 1
    assert_settled(connection, spec, [worker], tmp_path)


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("whose", ["aggregator", "worker"])
def test_connection_breaks_in_the_middle_of_a_payload(
    connection: Connection, reach: Reach, near: dict[str, Proxy], tmp_path: Path,
    whose: str, direction: Direction,
) -> None:  # fmt: skip
    """A part that is published, weights that are pulled, a part that is read, weights that are committed: by half."""
    spec = counting_spec(300_000)  # 1.2 MB
    store = create_expert(connection, spec)
    with (
        serving(reach(near["aggregator"].url), keep_updates=tmp_path),
        CountingWorker(reach(near["worker"].url), spec) as worker,
    ):
        more(store, 1)
        fired = near[whose].cut_after(500_000, direction)
        assert fired.wait(5)
        more(store, 2)
        worker.finish()
    assert near[whose].hits["cut_after_bytes"] == 1
    assert_settled(connection, spec, [worker], tmp_path)


def test_connection_breaks_in_a_blocked_read(
    connection: Connection, reach: Reach, near: dict[str, Proxy], tmp_path: Path
) -> None:
    """An aggregator that waits for entries learns of it at once, and reads on."""
    spec = counting_spec()
    store = create_expert(connection, spec)
    with serving(reach(near["aggregator"].url), keep_updates=tmp_path, block_ms=500):
        cut: set[str] = set()  # clients that the server lists until it sees that they are gone

        def blocked() -> set[str]:
            clients = connection.client.client_list()
            return {client["id"] for client in clients if "b" in client["flags"]} - cut

        for _ in range(3):
            cut |= eventually("another blocked client", blocked)
            near["aggregator"].cut()
        with CountingWorker(reach(near["worker"].url), spec) as worker:
            more(store, 2)
            worker.finish()
    assert near["aggregator"].hits["cut"] == 3
    assert_settled(connection, spec, [worker], tmp_path)


@pytest.mark.one_server
def test_idle_connections_are_dropped(
    connection: Connection, reach: Reach, near: dict[str, Proxy], tmp_path: Path
) -> None:
    """A NAT that forgets the worker between two publications: each finds a dead connection."""
    spec = counting_spec()
    store = create_expert(connection, spec, sync_interval_s=0.5)
    near["worker"].idle_timeout_s = 0.15
    with (
        serving(reach(near["aggregator"].url), keep_updates=tmp_path),
        CountingWorker(reach(near["worker"].url), spec) as worker,
    ):
        more(store, 3)
        assert near["worker"].hits["idle"] >= 2
        worker.finish()
    assert_settled(connection, spec, [worker], tmp_path)


@pytest.mark.one_server
def test_slow_redis_and_two_aggregators(
    connection: Connection,
    reach: Reach,
    near: dict[str, Proxy],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Replies so slow that the lease expires while its holder works, and both decide the same: one of them commits."""
    caplog.set_level(logging.INFO)
    spec = counting_spec()
    store = create_expert(connection, spec)
    slow = near["aggregator"]
    with ExitStack() as stack:
        for holder in ("one", "two"):
            stack.enter_context(serving(reach(slow.url), holder, keep_updates=tmp_path, lease_s=0.5))
        workers = [
            stack.enter_context(CountingWorker(reach(near["worker"].url), spec, f"w{n}")) for n in range(5)
        ]
        more(store, 2)
        slow.delay_s = 0.15
        eventually(
            "a lost race",
            lambda: "another process committed meanwhile; loading again" in caplog.text,
            timeout_s=30,
        )
        more(store, 5)
        assert slow.hits["delayed"] >= 20
        slow.delay_s = 0.0
        for worker in workers:
            worker.finish()
    assert_settled(connection, spec, workers, tmp_path)


@pytest.mark.one_server
def test_frozen_redis(connection: Connection, reach: Reach, near: dict[str, Proxy], tmp_path: Path) -> None:
    """No byte moves until all have timed out; then their old commands arrive after all, beside the new ones."""
    spec = counting_spec()
    store = create_expert(connection, spec)
    with (
        serving(reach(near["aggregator"].url), keep_updates=tmp_path),
        CountingWorker(reach(near["worker"].url), spec) as worker,
    ):
        more(store, 2)
        with frozen(*near.values()):
            eventually(
                "the sentence",
                lambda: "cannot be reached (Timeout" in worker.sync.status.problem,
                timeout_s=10,
            )
            trained = worker.steps
            eventually("training goes on", lambda: worker.steps > trained + 50, timeout_s=10)
        more(store, 2)
        worker.finish()
    assert all(proxy.hits["frozen"] for proxy in near.values())
    assert_settled(connection, spec, [worker], tmp_path)


def test_redis_takes_no_more_clients(server: EmbeddedRedis, reach: Reach, tmp_path: Path) -> None:
    """The worker says what is wrong and what to do, and all goes on when there is room again."""
    spec = counting_spec()
    with EmbeddedRedis(server=server.server) as private, Proxy(private.socket) as proxy:
        admin = reach(private.url)
        store = create_expert(admin, spec)
        with (
            serving(reach(proxy.url), keep_updates=tmp_path),
            CountingWorker(reach(proxy.url), spec) as worker,
        ):
            more(store, 2)
            admin.client.config_set("maxclients", 1)
            proxy.cut()
            eventually(
                "the sentence",
                lambda: (
                    worker.sync.status.problem
                    == f"Redis at {proxy.url} takes no more connections: raise its maxclients"
                ),
                timeout_s=5,
            )
            admin.client.config_set("maxclients", 100)
            more(store, 2)
            worker.finish()
        assert proxy.hits["cut"] == 2
        assert_settled(admin, spec, [worker], tmp_path)


def test_master_becomes_a_read_only_replica(
    server: EmbeddedRedis, reach: Reach, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A failover that went to somebody else: nothing is written, it is said, and all goes on when it is back."""
    spec = counting_spec()
    with EmbeddedRedis(server=server.server) as private, Proxy(private.socket) as proxy:
        admin = reach(private.url)
        store = create_expert(admin, spec)
        with (
            serving(reach(proxy.url), keep_updates=tmp_path),
            CountingWorker(reach(proxy.url), spec) as worker,
        ):
            more(store, 2)
            admin.client.replicaof("127.0.0.1", "1")  # a master that does not answer
            sentence = f"{EXPERT}: Redis at {proxy.url} is a read-only replica: use the URL of the master"
            eventually("the sentence", lambda: sentence in caplog.text, timeout_s=5)
            admin.client.replicaof("NO", "ONE")
            more(store, 2)
            worker.finish()
        assert_settled(admin, spec, [worker], tmp_path)


def _create(connection: Connection, _: Path) -> object:
    spec = counting_spec()
    return ExpertStore(connection, "another").create(spec, first_meta(spec), AdapterBuffer(spec.layout).file)


def _mend(connection: Connection, _: Path) -> object:
    return ExpertStore(connection, EXPERT).mend()


def _restore(connection: Connection, backup: Path) -> object:
    return restore(BackupStore(connection), Backup(backup), replace=True)


@pytest.mark.parametrize("action", ["cut_before", "cut_after"])
@pytest.mark.parametrize(("write", "command"), [(_create, b"UNLINK"), (_mend, b"DEL"), (_restore, b"UNLINK")])
def test_a_connection_that_breaks_is_not_taken_for_a_rival(
    connection: Connection, reach: Reach, near: dict[str, Proxy], tmp_path: Path,
    write: Callable[[Connection, Path], object], command: bytes, action: Action,
) -> None:  # fmt: skip
    """What is written where nobody else may have written says that Redis is away, not what somebody else did."""
    store = create_expert(connection, counting_spec())
    backed_up(connection, tmp_path / "backup")
    connection.client.xadd(store.keys.updates, {"rival": "1"}, id=f"{2**64 - 1}-{2**64 - 1}")
    connection.client.xtrim(store.keys.updates, maxlen=0)
    fired = near["aggregator"].on(command, action)
    with raises(RedisUnavailableError, about="connection"):
        write(reach(near["aggregator"].url), tmp_path / "backup")
    assert fired.is_set()


def test_a_connection_that_is_cut_off_waits_for_nothing_more(connection: Connection, redis_url: str) -> None:
    """The command that waits for its answer fails at once, with a sentence; and so does every later one."""
    waiting = Connection(RedisSettings(url=redis_url, timeout_s=300.0))
    told: list[str] = []

    def ask(command: Callable[[], object]) -> None:
        with pytest.raises(RedisUnavailableError) as error, waiting.errors():
            command()
        told.append(str(error.value))

    thread = threading.Thread(target=ask, args=(lambda: waiting.client.blpop("nothing", 0),))
    thread.start()
    eventually("it waits", lambda: connection.client.info("clients")["blocked_clients"])
    waiting.cut_off()
    thread.join(20)
    ask(waiting.client.ping)
    assert told == [f"Redis at {waiting.settings.shown} had not answered when it was time to stop"] * 2
