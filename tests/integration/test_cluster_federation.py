"""A federation on a Redis Cluster: experts on all masters, and every step counts once whatever happens to them."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from consumers.daemon import Aggregator
from consumers.recovery.listing import ExpertList
from fedmoe.cli.main import cli
from fedmoe.errors import RedisUnavailableError
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.spec import Spec
from fedmoe.settings import AggregatorSettings, GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.inspect import Inspector
from tests.cluster import Cluster
from tests.counting import EXPERT, CountingWorker, assert_settled, counting_spec, create_expert
from tests.federation import make_expert, serving, small_spec
from tests.processes import eventually

Reach = Callable[..., Connection]
EXPERTS = ("docs_expert", "python_expert", "sql_expert")


@pytest.fixture
def cluster(server: EmbeddedRedis, tmp_path: Path) -> Iterator[Cluster]:
    """Three masters, each with a replica."""
    with Cluster(server.server, tmp_path / "cluster") as running:
        yield running


@dataclass
class Federation:
    """One expert, two workers and two aggregators; one aggregator stands by."""

    spec: Spec
    workers: list[CountingWorker]
    archive: Path
    look: Connection

    def version(self) -> int:
        """Of the expert."""
        with self.look.errors():
            return int(self.look.client.hget(self.look.keys.expert(EXPERT).meta, "version") or 0)

    def more(self, n: int = 6) -> float:
        """Wait until there are n more versions; returns the seconds until the first."""
        begin, since = eventually("an answer", lambda: self.version() + 1) - 1, time.monotonic()
        eventually("a commit", lambda: self.version() > begin, timeout_s=30)
        first = time.monotonic() - since
        eventually(f"{n} more updates", lambda: self.version() >= begin + n, timeout_s=30)
        return first

    def settle(self) -> None:
        """Every step of every worker counts exactly once, and the weights are those of a replay."""
        for worker in self.workers:
            worker.finish(30.0)
        eventually("the slot", self.version)
        assert_settled(self.look, self.spec, self.workers, self.archive)


@contextmanager
def federation(
    connect: Callable[[], Connection], archive: Path, spec: Spec | None = None
) -> Iterator[Federation]:
    """At work, a few updates in."""
    spec = spec or counting_spec()
    look = connect()
    create_expert(look, spec)
    with ExitStack() as running:
        workers = []
        for name in ("alice", "bob"):
            running.enter_context(serving(connect(), f"{name}'s", keep_updates=archive))
            workers.append(running.enter_context(CountingWorker(connect(), spec, name)))
        made = Federation(spec, workers, archive, look.at(look.keys.expert(EXPERT).meta))
        made.more()
        yield made


def test_training_goes_through_a_failover(cluster: Cluster, reach: Reach, tmp_path: Path) -> None:
    """CLUSTER FAILOVER, there and back: a planned one loses nothing."""
    with federation(partial(reach, cluster.url), tmp_path / "archive") as run:
        key = run.look.keys.expert(EXPERT).meta
        for _ in range(2):
            cluster.fail_over(key)
            run.more()
            eventually("a replica in step", lambda: cluster.replica_of(cluster.master_of(key)), timeout_s=30)
        run.settle()


def test_a_killed_master_loses_what_its_replica_never_got(
    cluster: Cluster, reach: Reach, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Acknowledged commits are undone by the failover; workers send their updates again, each counts once."""
    caplog.set_level(logging.INFO)
    with federation(partial(reach, cluster.url), tmp_path / "archive") as run:
        key = run.look.keys.expert(EXPERT).meta
        master = cluster.master_of(key)
        replica = cluster.replica_of(master)
        replica.signal(signal.SIGSTOP)
        master.client.execute_command("CLIENT KILL TYPE replica")
        run.more(10)
        before = run.version()
        master.kill()
        replica.signal(signal.SIGCONT)
        eventually("the promotion", lambda: replica.client.role()[0] == b"master", timeout_s=30)
        survived = int(replica.client.hget(key, "version"))
        assert survived <= before - 5
        eventually("the new master", lambda: run.version() > survived, timeout_s=30)
        master.start()
        run.more()
        run.settle()


def test_a_master_that_answers_for_slots_it_has_lost(cluster: Cluster, reach: Reach, tmp_path: Path) -> None:
    """It sleeps through its own failover, wakes, and for a moment answers as if nothing had been: nothing is lost."""
    with federation(partial(reach, cluster.url), tmp_path / "archive") as run:
        key = run.look.keys.expert(EXPERT).meta
        master = cluster.master_of(key)
        replica = cluster.replica_of(master)
        master.signal(signal.SIGSTOP)
        eventually("the promotion", lambda: replica.client.role()[0] == b"master", timeout_s=30)
        run.more()
        master.signal(signal.SIGCONT)
        run.more(20)
        eventually("the old master to follow", lambda: master.client.role()[0] == b"slave", timeout_s=30)
        run.settle()


def test_a_slot_moves_under_load(cluster: Cluster, reach: Reach, tmp_path: Path) -> None:
    """Three times, key by key, while all publish and commit."""
    with federation(partial(reach, cluster.url), tmp_path / "archive") as run:
        for _ in range(3):
            assert cluster.move_slot(run.look.keys.expert(EXPERT).meta, pause_s=0.02) >= 6
            run.more()
        run.settle()


@pytest.mark.slow
@pytest.mark.one_server
def test_a_slot_of_large_values_moves_under_load(cluster: Cluster, reach: Reach, tmp_path: Path) -> None:
    """Weights of 35 MiB: MIGRATE blocks both nodes for each, perhaps longer than a command may take."""
    spec = counting_spec(35 * 2**20 // 4)
    with federation(partial(reach, cluster.url, 10.0), tmp_path / "archive", spec) as run:
        began = time.monotonic()
        assert cluster.move_slot(run.look.keys.expert(EXPERT).meta) >= 6
        print(
            f"\nthe slot moved in {time.monotonic() - began:.1f} s, the next commit came after {run.more(3):.1f} s"
        )
        run.settle()


def test_uncovered_slots_stop_their_experts_and_nobody_else(
    cluster: Cluster, reach: Reach, tmp_path: Path
) -> None:
    """A master and its replica die; status shows the other experts and says what is missing; then they come back."""
    connection = reach(cluster.url)
    for name in EXPERTS:
        make_expert(connection, name)
    masters = {name: cluster.master_of(connection.keys.expert(name).meta) for name in EXPERTS}
    assert len({master.port for master in masters.values()}) == 3
    for node in cluster.nodes:
        node.client.config_set("cluster-require-full-coverage", "no")
    gone = [masters["docs_expert"], cluster.replica_of(masters["docs_expert"])]
    listed = cluster.master_of(connection.keys.experts)
    if listed in gone:
        pytest.fail("choose other names: the list of experts is in the slots that die")
    for node in gone:
        node.kill()

    def seen() -> dict[str, bool]:
        return {one.name: one.meta is not None for one in Inspector(connection).federation().experts}

    expected = {name: name != "docs_expert" for name in EXPERTS}
    eventually("the others", lambda: seen() == expected, timeout_s=20)
    view = next(one for one in Inspector(connection).federation().experts if one.name == "docs_expert")
    assert any("cannot be read" in problem for problem in view.problems)
    with pytest.raises(RedisUnavailableError):
        GatewayStore(connection).meta("docs_expert")
    for node in gone:
        node.start()
    eventually("all again", lambda: all(seen().values()), timeout_s=30)


def test_every_command_reads_by_expert(cluster: Cluster, reach: Reach, tmp_path: Path) -> None:
    """Experts on three masters and the merged gateway: status, list, backup, removal, restore, verify, doctor."""
    connection = reach(cluster.url)
    stop, spec = threading.Event(), small_spec()
    for name in EXPERTS:
        make_expert(connection, name, spec, initial_weights(spec.layout, spec.init_seed))
    daemon = Aggregator(
        connection.settings, [], AggregatorSettings(lease_s=1.0, keep_updates=tmp_path / "kept"),
        GatewaySettings(interval_s=0.2), holder="one",
    )  # fmt: skip
    thread = threading.Thread(target=daemon.run, args=(stop,))
    thread.start()

    def fedmoe(*words: str) -> str:
        done = CliRunner().invoke(cli, [*words, "--redis", cluster.url], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return str(done.output)

    try:
        merged = eventually("the gateway", GatewayStore(connection).merged)
        eventually("all in it", lambda: set(GatewayStore(connection).merged().experts) == set(EXPERTS))
        assert merged
        assert all(name in fedmoe("status") for name in EXPERTS)
        assert all(name in fedmoe("expert", "list") for name in EXPERTS)
        fedmoe("backup", str(tmp_path / "backup"))
        fedmoe("expert", "set", "sql_expert", "--lr", "0.5")
        fedmoe("expert", "weight", "sql_expert", "2")
        fedmoe("expert", "remove", "docs_expert", "--yes")
        assert set(GatewayStore(connection).experts()) == {"python_expert", "sql_expert"}
        fedmoe("restore", str(tmp_path / "backup"), "--replace")
        assert GatewayStore(connection).experts() == dict.fromkeys(EXPERTS, 1.0)
        fedmoe("verify", "--keep-updates", str(tmp_path / "kept"))
        fedmoe("gateway", "show", "--no-compare")
        doctor = fedmoe("doctor")
        assert "3 masters serve all 16384 slots" in doctor
        assert "the same on all 6 nodes" in doctor
        assert "cluster-require-full-coverage is yes" in doctor
        assert "work between two connections" in doctor
    finally:
        stop.set()
        thread.join()


def test_a_crash_between_two_slots_leaves_what_is_repaired(cluster: Cluster, reach: Reach) -> None:
    """List and expert lie in two slots: what died between the two writes, an aggregator's next look sets right."""
    connection = reach(cluster.url)
    for name in EXPERTS:
        make_expert(connection, name)
    store = GatewayStore(connection)
    experts = ExpertList(store)
    assert set(experts.reconcile()) == set(EXPERTS)
    listed, key = connection.at(connection.keys.experts), connection.keys.expert("docs_expert").meta
    assert connection.at(key) is not listed
    removed = {"removed": "2026-11-30T00:00:00Z", "commit": "a"}
    with connection.at(key).client.pipeline(transaction=True) as pipe:  # a removal that died before the list
        pipe.delete(key)
        pipe.hset(key, mapping=removed)
        pipe.execute()
    listed.client.hdel(connection.keys.experts, "sql_expert")  # a restore that died before it
    assert set(experts.reconcile()) == {"python_expert", "sql_expert"}
    assert set(store.experts()) == {"python_expert", "sql_expert"}
