"""Real processes that stop, die and come back: what the aggregator and Redis owe to those who go on."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis, wheel_server
from fedmoe.store.expert import ExpertStore
from tests.counting import EXPERT, CountingWorker, assert_settled, counting_spec, create_expert
from tests.federation import ScriptedWorker
from tests.processes import eventually, fedmoe, is_stopped, running

LEASE_S = 1.0

Reach = Callable[[str], Connection]


@pytest.fixture
def reach() -> Iterator[Reach]:
    """Make connections to a URL; all are closed at the end."""
    with ExitStack() as made:

        def make(url: str) -> Connection:
            connection = Connection(RedisSettings(url=url, timeout_s=5.0))
            made.callback(connection.close)
            return connection

        yield make


def aggregator(url: str, *more: str) -> tuple[str, ...]:
    """The command line of an aggregator with a short lease."""
    return (
        "aggregator", "run", "--redis", url, "--expert", EXPERT, "--lease", f"{LEASE_S:g}", "--block-ms", "250", *more
    )  # fmt: skip


def holder(store: ExpertStore) -> int:
    """Process id of whoever has the lease; 0 for nobody."""
    name = store.connection.client.get(store.keys.lease)
    return int(name.decode().rsplit("-", 2)[1]) if name else 0


def version(store: ExpertStore) -> int:
    return store.load().meta.version


def test_stopped_aggregator_commits_nothing_of_what_it_had_read(
    redis_url: str, reach: Reach, tmp_path: Path
) -> None:
    """It stops right before its commit, past the lease; another one decides; when it goes on it commits nothing."""
    spec = counting_spec()
    connection = reach(redis_url)
    store = create_expert(connection, spec)
    worker = ScriptedWorker(connection, spec)
    stops_itself = (
        "-m",
        "tests.chaos.failpoints",
        "ExpertStore.commit",
        "1",
        "stop",
        str(tmp_path / "journal"),
    )
    with ExitStack() as stack:
        first = stack.enter_context(running(tmp_path / "first", *aggregator(redis_url), program=stops_itself))
        eventually("the first one serves", lambda: holder(store) == first.pid)
        worker.push(1.0)
        eventually("the first one has decided it, and stops", lambda: is_stopped(first))
        # Begun only now, so that it cannot take over from one that a busy machine holds up; with a lease that is long
        # enough not to be lost in that way.
        second = stack.enter_context(running(tmp_path / "second", *aggregator(redis_url, "--lease", "20")))
        eventually("the second one decides", lambda: version(store) == 1)
        assert holder(store) == second.pid
        commit = store.load().meta.commit
        first.send_signal(signal.SIGCONT)
        eventually("the first one stands by", lambda: "standing by" in (tmp_path / "first").read_text())
        loaded = store.load()
        assert (loaded.meta.commit, loaded.meta.version) == (commit, 1)
        worker.pull()
        worker.push(1.0)
        eventually("version 2", lambda: version(store) == 2)
    assert "another process committed meanwhile; loading again" in (tmp_path / "first").read_text()
    assert str(second.pid) in store.load().meta.aggregator
    assert (tmp_path / "journal").read_text().split()[2:] == ["stop", "ExpertStore.commit", "before"]
    lines = [entry for _, entry in connection.client.xrange(store.keys.log)]
    assert [line[b"seq"] for line in lines] == [b"1", b"2"]
    worker.pull()
    assert worker.local.tolist() == [2.0] * spec.layout.numel
    assert connection.client.xlen(store.keys.updates) == 0


def test_standby_applies_within_the_lease_of_the_death(redis_url: str, reach: Reach, tmp_path: Path) -> None:
    """Kill -9 of the aggregator: its lease ends after its time, and the standby applies what is published then."""
    spec = counting_spec()
    connection = reach(redis_url)
    store = create_expert(connection, spec)
    worker = ScriptedWorker(connection, spec)
    with running(tmp_path / "first", *aggregator(redis_url)) as first:
        eventually("the first one serves", lambda: holder(store) == first.pid)
        with running(tmp_path / "second", *aggregator(redis_url)) as second:
            eventually("the second one stands by", lambda: "standing by" in (tmp_path / "second").read_text())
            worker.push(1.0)
            eventually("version 1", lambda: version(store) == 1)
            worker.pull()
            first.kill()
            first.wait()
            left_ms = connection.client.pttl(store.keys.lease)
            worker.push(1.0)
            eventually("version 2", lambda: version(store) == 2)
            assert str(second.pid) in store.load().meta.aggregator
    assert left_ms <= LEASE_S * 1000


def test_first_commit_after_a_restart_of_redis(reach: Reach, tmp_path: Path) -> None:
    """Kill -9 of Redis, a restart on its AOF once all waits have become their longest: commits go on."""
    spec = counting_spec()
    (tmp_path / "redis").mkdir()
    with EmbeddedRedis(tmp_path / "redis") as server:
        connection = reach(server.url)
        store = create_expert(connection, spec)
        kept = ("--keep-updates", str(tmp_path))
        with (
            running(tmp_path / "log", *aggregator(server.url, *kept)) as process,
            CountingWorker(reach(server.url), spec) as worker,
        ):
            eventually("some updates", lambda: version(store) >= 3)
            server.kill()
            time.sleep(3.0)  # for the case that is hardest: the longest waits (backoff.LONGEST_S) are reached
            server.start()
            before = version(store)
            eventually("the next commit", lambda: version(store) > before)
            assert process.poll() is None
            worker.finish()
        assert_settled(connection, spec, [worker], tmp_path)


@pytest.mark.parametrize("program", ["redis", "valkey"])
def test_aof_whose_end_is_gone(
    reach: Reach, tmp_path: Path, caplog: pytest.LogCaptureFixture, program: str
) -> None:
    """Three commits lost with the AOF's last bytes, and no aggregator left: the worker sends again what it knows of."""
    path = shutil.which("redis-server") if program == "redis" else wheel_server()
    if path is None:
        pytest.skip(f"no {program} on this machine")
    spec = counting_spec()
    directory = tmp_path / "redis"
    directory.mkdir()
    with EmbeddedRedis(directory, server=path) as server:
        connection = reach(server.url)
        store = create_expert(connection, spec)
        kept = ("--keep-updates", str(tmp_path / "kept"))
        with CountingWorker(reach(server.url), spec) as worker:
            with running(tmp_path / "first", *aggregator(server.url, *kept)):
                eventually("some updates", lambda: version(store) >= 5)
            # Nobody remembers what the file loses but the worker.
            server.kill()
            gone = cut_commits(directory, 3)
            server.start()
            before = version(store)
            with running(tmp_path / "second", *aggregator(server.url, *kept)):
                eventually("further commits", lambda: version(store) >= before + 4)
                worker.finish()
        assert_settled(connection, spec, [worker], tmp_path / "kept")
        assert gone > 500
        assert "Redis has an older state: version" in caplog.text
        verified = fedmoe("verify", "--redis", server.url, "--keep-updates", str(tmp_path / "kept"))
    assert verified.returncode == 0, verified.stderr
    assert verified.stdout.endswith("equal\n")


def cut_commits(directory: Path, n: int) -> int:
    """Cut off the last n commits of an AOF, the first of them in its middle; returns how many bytes are gone."""
    (file,) = (directory / "appendonlydir").glob("*.incr.aof")
    content = file.read_bytes()
    end = len(content)
    for _ in range(n):
        end = content.rindex(b"MULTI\r\n", 0, content.rindex(b"}:log\r\n", 0, end))
    # Past MULTI itself: the server drops a transaction that is not whole (aof-load-truncated).
    end += len(b"MULTI\r\n") + 20
    with file.open("r+b") as aof:
        aof.truncate(end)
    return len(content) - end
