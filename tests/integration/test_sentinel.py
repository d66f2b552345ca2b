"""Redis behind Sentinel: a failover loses acknowledged writes, and still every step counts once."""

import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner

from fedmoe.cli.main import cli
from fedmoe.errors import RedisUnavailableError, RedisUnfitError
from fedmoe.protocol.spec import Spec
from fedmoe.redis_settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.sentinel import QUESTION_TIMEOUT_S
from tests.counting import EXPERT, CountingWorker, assert_settled, counting_spec, create_expert
from tests.errors import raises
from tests.federation import serving
from tests.ports import free_port
from tests.processes import eventually
from tests.self_signed import certificate_for
from tests.sentinel import MASTER, Process, Replicated

Reach = Callable[..., Connection]


@pytest.fixture
def replicated(server: EmbeddedRedis, tmp_path: Path) -> Iterator[Replicated]:
    """A master, its replica and one sentinel."""
    with Replicated(server.server, tmp_path) as running:
        yield running


@dataclass
class Federation:
    """One expert, two workers and two aggregators, all over sentinel://; one aggregator stands by."""

    spec: Spec
    workers: list[CountingWorker]
    archive: Path
    look: Connection

    def version(self, server: Process) -> int:
        """Of the expert, as this server has it."""
        return int(server.client.hget(self.look.keys.expert(EXPERT).meta, "version") or 0)

    def applied(self) -> list[int]:
        """How many of its updates each worker has seen applied."""
        return [worker.sync.status.applied for worker in self.workers]

    def more(self, server: Process, n: int = 6) -> None:
        """Wait until this server has n more versions."""
        begin = self.version(server)
        eventually(f"{n} more updates", lambda: self.version(server) >= begin + n, timeout_s=30)

    def settle(self) -> None:
        """Every step of every worker counts exactly once, and the weights are those of a replay."""
        for worker in self.workers:
            worker.finish(30.0)
        assert_settled(self.look, self.spec, self.workers, self.archive)


@contextmanager
def federation(
    replicated: Replicated, reach: Reach, archive: Path, *timeouts_s: float
) -> Iterator[Federation]:
    """At work, a few updates in; one worker and one aggregator for each timeout of their connections."""
    spec = counting_spec()
    look = reach(replicated.url)
    create_expert(look, spec)
    with ExitStack() as running:
        workers = []
        for name, timeout_s in zip(("alice", "bob"), timeouts_s or (2.0, 2.0), strict=True):
            running.enter_context(
                serving(reach(replicated.url, timeout_s), f"{name}'s", keep_updates=archive)
            )
            workers.append(
                running.enter_context(CountingWorker(reach(replicated.url, timeout_s), spec, name))
            )
        made = Federation(spec, workers, archive, look)
        made.more(replicated.first)
        eventually("the replica to know the expert", lambda: made.version(replicated.second))
        yield made


def test_lost_acknowledged_writes_are_published_again(
    replicated: Replicated, reach: Reach, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The master dies with decisions that the workers saw and the replica never got: they come again, each once."""
    caplog.set_level(logging.INFO)
    with federation(replicated, reach, tmp_path / "archive") as run:
        replicated.hold_replication()
        before = run.applied()
        eventually(
            "four more of each", lambda: all(a >= b + 4 for a, b in zip(run.applied(), before, strict=True))
        )
        acknowledged = run.version(replicated.first)
        replicated.fail_over()
        killed = time.monotonic()
        survived = run.version(replicated.second)
        assert 0 < survived <= acknowledged - 6
        eventually(
            "commits on the new master", lambda: run.version(replicated.second) > survived, timeout_s=30
        )
        print(
            f"\nversion {acknowledged} was acknowledged, {survived} survived; "
            f"writes were away for {time.monotonic() - killed:.1f} s"
        )
        run.more(replicated.second)
        run.settle()
    again = re.findall(
        r"version \d+ before, version \d+ now; this worker sends (\d+) updates? again", caplog.text
    )
    assert len(again) == 2
    assert all(int(number) >= 3 for number in again)
    assert "are lost" not in caplog.text


def test_old_master_comes_back_as_a_replica(replicated: Replicated, reach: Reach, tmp_path: Path) -> None:
    """It starts as a master, with writes that nobody else has: nobody writes to it, and it becomes a replica."""
    with federation(replicated, reach, tmp_path / "archive") as run:
        replicated.hold_replication()
        run.more(replicated.first)
        replicated.fail_over()
        eventually("the promotion", lambda: replicated.is_master(replicated.second), timeout_s=30)
        replicated.first.start()
        looked = 0
        with suppress(redis.ConnectionError):  # that is how a demotion looks
            while replicated.first.client.role()[0] == b"master":
                written = set(replicated.first.client.info("commandstats"))
                assert not written & {"cmdstat_exec", "cmdstat_xadd", "cmdstat_evalsha", "cmdstat_xreadgroup"}
                looked += 1
                time.sleep(0.02)
        assert looked
        eventually("the replica", lambda: replicated.is_replica(replicated.first), timeout_s=30)
        run.more(replicated.first)
        run.settle()
    one, other = (
        GatewayStore(reach(f"redis://127.0.0.1:{server.port}"))
        for server in (replicated.first, replicated.second)
    )
    eventually("equal data", lambda: one.history(EXPERT) == other.history(EXPERT), timeout_s=10)


def test_planned_failover_costs_a_moment(replicated: Replicated, reach: Reach, tmp_path: Path) -> None:
    """SENTINEL FAILOVER: the old master lives on as a replica, and everybody leaves it."""
    with federation(replicated, reach, tmp_path / "archive") as run:
        replicated.sentinels[0].client.execute_command("SENTINEL FAILOVER", MASTER)
        eventually("the promotion", lambda: replicated.is_master(replicated.second), timeout_s=30)
        run.more(replicated.second)
        run.settle()
    # It has to take over the new master's data first, which may take longer than the workers need.
    eventually("the old master to follow", lambda: replicated.is_replica(replicated.first), timeout_s=30)


def test_two_masters_at_once(replicated: Replicated, reach: Reach, tmp_path: Path) -> None:
    """A frozen master wakes after the failover: one half works on it until it is demoted, the other on the new one.

    What the first half got applied is undone, and counts once all the same.
    """
    with federation(replicated, reach, tmp_path / "archive", 2.0, 20.0) as run:
        replicated.first.signal(signal.SIGSTOP)
        eventually("the promotion", lambda: replicated.is_master(replicated.second), timeout_s=30)
        run.more(replicated.second)  # those who gave up after 2 s
        awoken = time.monotonic()
        replicated.first.signal(signal.SIGCONT)
        begin = there = run.version(replicated.first)
        with suppress(redis.ConnectionError):  # that is how a demotion looks
            while replicated.first.client.role()[0] == b"master":
                there = max(there, run.version(replicated.first))
        print(
            f"\ntwo masters for {time.monotonic() - awoken:.1f} s: the old one went on from version {begin} to {there}"
        )
        assert there > begin
        run.more(replicated.second)
        run.settle()


@pytest.mark.parametrize("ends", ["killed", "demoted"])
@pytest.mark.parametrize("idle", [True, False], ids=["idle", "blocked"])
def test_connection_notices_that_its_master_was_replaced(
    replicated: Replicated, reach: Reach, ends: str, idle: bool
) -> None:
    """Whether it rests or waits in XREADGROUP: one error at most, then the new master, and the generation tells."""
    connection = reach(replicated.url, 20.0)
    create_expert(connection, counting_spec())
    store = ExpertStore(connection, EXPERT)
    before = store.load().generation
    problems: list[RedisUnavailableError] = []

    def wait() -> None:
        try:
            store.read(block_ms=15_000, count=1)
        except RedisUnavailableError as error:
            problems.append(error)

    reading = threading.Thread(target=wait if not idle else lambda: None)
    reading.start()
    if ends == "killed":
        replicated.first.kill()
    else:
        replicated.sentinels[0].client.execute_command("SENTINEL FAILOVER", MASTER)
    eventually("the promotion", lambda: replicated.is_master(replicated.second), timeout_s=30)
    if ends == "demoted":
        eventually("the demotion", lambda: replicated.is_replica(replicated.first), timeout_s=30)
    reading.join(5.0)
    assert not reading.is_alive()
    assert len(problems) == (not idle)
    connection.client.set("written", "here")
    assert connection.generation > before
    assert replicated.second.client.get("written") == b"here"


def test_commands_over_a_sentinel_url(replicated: Replicated, reach: Reach) -> None:
    """`fedmoe status` and `fedmoe doctor` see the master."""
    create_expert(reach(replicated.url), counting_spec())
    status = CliRunner().invoke(cli, ["status", "--redis", replicated.url], catch_exceptions=False)
    assert status.exit_code == 0
    assert replicated.url in status.output
    assert EXPERT in status.output
    doctor = CliRunner().invoke(cli, ["doctor", "--redis", replicated.url], catch_exceptions=False)
    assert "this user may serve experts" in doctor.output
    assert "replica" not in doctor.output


def test_what_is_wrong_is_said(replicated: Replicated, reach: Reach) -> None:
    """A wrong master name, no sentinel, a server that is none, and no master at the moment."""
    hosts, gone = replicated.hosts, free_port()
    sentences = {
        f"sentinel://{hosts}/other": f"Sentinel at {hosts} knows no master 'other': take the name from "
        "`redis-cli -p 26379 SENTINEL MASTERS`",
        f"sentinel://127.0.0.1:{gone}/M": f"no sentinel can be asked for the master (127.0.0.1:{gone}: ",
        f"sentinel://127.0.0.1:{replicated.first.port}/M": "no sentinel can be asked for the master",
        f"sentinel://127.0.0.1:{gone},{hosts}/other": "knows no master 'other'",
    }
    for url, sentence in sentences.items():
        with pytest.raises(RedisUnavailableError) as error:
            reach(url).ping()
        assert str(error.value).startswith(sentence) or sentence in str(error.value)
    reach(f"sentinel://127.0.0.1:{gone},{hosts}/{MASTER}").ping()
    replicated.second.kill()
    replicated.first.kill()

    def said() -> bool:
        with pytest.raises(RedisUnavailableError) as error:
            reach(replicated.url).ping()
        return (
            str(error.value) == f"the master {MASTER!r} is down and Sentinel has not promoted another one yet"
        )

    eventually("Sentinel to notice", said, timeout_s=20)


def test_master_made_a_replica_by_hand(replicated: Replicated, reach: Reach) -> None:
    """Nobody closes the connections: the first READONLY does, and Sentinel's new master is found."""
    connection = reach(replicated.url)
    connection.ping()
    replicated.second.client.replicaof("NO", "ONE")
    replicated.first.client.replicaof("127.0.0.1", replicated.second.port)
    before = connection.generation

    def write() -> bool:
        with connection.errors():
            return bool(connection.client.set("written", "here"))

    with pytest.raises(RedisUnavailableError):
        write()
    connection.ping()
    assert connection.generation > before
    eventually("a write", write, timeout_s=30)
    assert replicated.second.client.get("written") == b"here"


def test_sentinel_that_does_not_answer_is_passed_over(
    server: EmbeddedRedis, reach: Reach, tmp_path: Path
) -> None:
    """One of three is frozen: it costs a connection the question's timeout, and the next one nothing."""
    with Replicated(server.server, tmp_path, sentinels=3) as running:
        running.sentinels[0].signal(signal.SIGSTOP)
        connection = reach(running.url, 60.0)
        begin = time.monotonic()
        connection.ping()
        assert QUESTION_TIMEOUT_S <= time.monotonic() - begin < 15
        connection.client.connection_pool.disconnect()
        begin = time.monotonic()
        connection.ping()
        assert time.monotonic() - begin < QUESTION_TIMEOUT_S
        assert connection.generation == 2


def test_logins(replicated: Replicated, reach: Reach) -> None:
    """The server's and the sentinels' are two, and a wrong one is said without its password."""
    for process in (replicated.first, replicated.sentinels[0]):
        process.client.execute_command("ACL SETUSER me on >right ~* +@all")
    sentinel = "sentinel_username=me&sentinel_password"
    reach(f"sentinel://me:right@{replicated.hosts}/{MASTER}?{sentinel}=right").ping()
    for url, about in {
        f"sentinel://me:wr0ng@{replicated.hosts}/{MASTER}": "login",
        f"{replicated.url}?{sentinel}=wr0ng": "sentinel",
    }.items():
        with raises(RedisUnavailableError, about=about) as error:
            reach(url).ping()
        assert "wr0ng" not in str(error.value)


def test_tls(server: EmbeddedRedis, reach: Reach, tmp_path: Path) -> None:
    """To the sentinels and to the server, both checked against the given CA."""
    file = certificate_for(server.server, tmp_path)
    with Replicated(server.server, tmp_path, certificate=file) as running:
        connection = reach(f"{running.url}?ssl_ca_certs={file}")
        connection.client.set("over", "tls")
        assert running.first.client.get("over") == b"tls"
        with raises(RedisUnavailableError, about="sentinel"):
            reach(f"{running.url}?ssl=true").ping()
        with raises(RedisUnavailableError, about="sentinel"):
            reach(running.url).ping()


@pytest.mark.one_server
@pytest.mark.parametrize("kind", ["node", "cluster", "sentinel"])
def test_a_node_on_another_machine_is_not_reached_without_tls(
    server: EmbeddedRedis, tmp_path: Path, kind: str
) -> None:
    """The URL is of this machine only, and the address that it leads to is not: no password may go there."""
    away = "0.0.0.0"  # noqa: S104  # reaches this machine on Linux, and is no address of loopback
    options = {
        "cluster": ["cluster-enabled yes", f"cluster-announce-ip {away}", f"cluster-port {free_port()}"]
    }
    one = Process(server.server, tmp_path / "one", options.get(kind, []))
    asked = one
    if kind == "sentinel":
        watch = [f"sentinel monitor {MASTER} {away} {one.port} 1"]
        asked = Process(server.server, tmp_path / "sentinel", watch, sentinel=True)
    try:
        for process in dict.fromkeys((one, asked)):
            process.start()
        if kind == "cluster":
            one.client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
            eventually("the cluster", lambda: one.client.cluster("INFO")["cluster_state"] == "ok")
        one.client.execute_command("ACL SETUSER", "someone", "on", ">pw", "~*", "+@all")
        url = {
            "node": f"redis://someone:pw@127.0.0.1:{one.port}",
            "cluster": f"cluster://someone:pw@127.0.0.1:{one.port}",
            "sentinel": f"sentinel://someone:pw@127.0.0.1:{asked.port}/{MASTER}",
        }[kind]
        node = (away, one.port) if kind == "node" else None
        for turn in (1, 2):  # a connection that was refused is not used later
            with raises(RedisUnfitError, about="insecure"):
                Connection(RedisSettings(url=url), node=node).ping()
            logins = one.client.info("commandstats").get("cmdstat_auth", {"calls": 0})["calls"]
            assert logins == (turn if kind == "cluster" else 0)  # to the node that the URL names
        Connection(RedisSettings(url=url, insecure=True), node=node).ping()
    finally:
        asked.kill()
        one.kill()
