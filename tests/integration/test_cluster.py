"""Redis Cluster: what holds on one server holds in each slot, and what the cluster answers is said in one sentence."""

import signal
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from fedmoe.errors import FedMoEError, RedisUnavailableError, RedisUnfitError
from fedmoe.protocol.keys import absent
from fedmoe.settings import RedisSettings
from fedmoe.store.cluster import QUESTION_TIMEOUT_S
from fedmoe.store.cluster_checks import cluster_checks
from fedmoe.store.connection import Connection, execute
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.expert import ExpertStore
from fedmoe.store.full import is_full, read_together, transact
from fedmoe.util.check import FAIL
from tests.cluster import Cluster
from tests.errors import raises
from tests.federation import ScriptedWorker, make_expert, serve
from tests.ports import free_port
from tests.processes import eventually

Reach = Callable[..., Connection]
EXPERT = "sql_expert"


@pytest.fixture(scope="module")
def shared(server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three masters without replicas, for tests that leave them as they were."""
    with Cluster(server.server, tmp_path_factory.mktemp("cluster"), replicas=0) as running:
        yield running


@pytest.fixture
def cluster(shared: Cluster) -> Cluster:
    """The same, empty."""
    eventually("the cluster", shared.is_whole)
    for node in shared.nodes:
        node.client.config_set("maxmemory", 0)
        node.client.flushall()
    return shared


@pytest.fixture
def at(cluster: Cluster, reach: Reach) -> Connection:
    """The connection to the expert's slot."""
    connection = reach(cluster.url)
    return connection.at(connection.keys.expert(EXPERT).meta)


def refuse(connection: Connection, command: Callable[[], object]) -> RedisUnavailableError:
    """The error of a command that must fail."""
    with pytest.raises(RedisUnavailableError) as error, connection.errors():
        command()
    return error.value


# ---- what redis-py's RedisCluster 8.1 does wrong, measured: whatever carries a commit must not


def test_a_connection_that_dies_between_watch_and_exec_loses_to_the_rival(
    cluster: Cluster, at: Connection
) -> None:
    """RedisCluster repeats the transaction without its WATCH, answers [b'OK'] and overwrites the rival."""
    key = at.keys.expert(EXPERT).meta
    rival = cluster.master_of(key).client
    with at.client.pipeline(transaction=True) as pipe:
        pipe.watch(key)
        assert not pipe.exists(key)
        rival.execute_command("CLIENT KILL TYPE normal SKIPME yes")
        rival.set(key, "rival")
        pipe.multi()
        pipe.set(key, "mine")
        assert refuse(at, lambda: execute(pipe)).about == "connection"
    assert rival.get(key) == b"rival"


def test_a_transaction_behind_a_frozen_server_runs_at_most_once(cluster: Cluster, reach: Reach) -> None:
    """RedisCluster sends the MULTI a second time, and both are executed."""
    connection = reach(cluster.url, 2.0)
    key = connection.keys.expert(EXPERT).updates
    at, node = connection.at(key), cluster.master_of(key)
    at.client.delete(key)
    node.signal(signal.SIGSTOP)
    try:
        with at.client.pipeline(transaction=True) as pipe:
            pipe.xadd(key, {"n": "1"})
            assert refuse(at, pipe.execute).about == "connection"
    finally:
        node.signal(signal.SIGCONT)
    time.sleep(0.3)
    assert node.client.xlen(key) == 1


def test_the_commands_of_a_transaction_can_be_sent_to_a_full_server(at: Connection) -> None:
    """RedisCluster's `command_stack` is always empty: a commit to a full Redis would report success."""
    keys = at.keys.expert(EXPERT)
    at.client.hset(keys.meta, "commit", "a")
    queued = at.client.pipeline(transaction=True)
    queued.hset(keys.meta, "commit", "b")
    with at.client.pipeline(transaction=True) as pipe:
        pipe.watch(keys.meta)
        assert transact(pipe, keys.meta, "a", [words for words, _ in queued.command_stack])
    assert at.client.hget(keys.meta, "commit") == b"b"


def test_scripts_run_on_the_watching_connection(at: Connection) -> None:
    """RedisCluster raises TypeError for an `eval` in a pipeline that watches."""
    keys = at.keys.expert(EXPERT)
    with at.client.pipeline(transaction=True) as pipe:
        pipe.watch(keys.meta)
        assert pipe.eval("return redis.call('EXISTS', KEYS[1])", 1, keys.meta) == 0


def test_a_full_cluster_still_commits(cluster: Cluster, at: Connection) -> None:
    """The whole path: an update waits on a full master, and its commit frees the memory."""
    expert = make_expert(at)
    worker = ScriptedWorker(at, expert.spec)
    worker.push(1.0)
    node = cluster.master_of(expert.store.keys.meta).client
    node.config_set("maxmemory", 1)
    with pytest.raises(redis.RedisError) as error:
        at.client.set(expert.store.keys.lost, "x")
    assert is_full(error.value)
    assert serve(expert) == ["applied"]
    node.config_set("maxmemory", 0)
    assert expert.store.load().meta.version == 1


# ---- a slot that moves


def test_nothing_of_a_script_is_executed_while_its_slot_moves(cluster: Cluster, at: Connection) -> None:
    """In the middle of a script, a key that is gone already would be refused after others were written."""
    keys = at.keys.expert(EXPERT)
    target = next(node for node in cluster.nodes if node is not cluster.master_of(keys.meta))
    at.client.hset(keys.meta, "commit", "a")
    at.client.set(keys.weights, "old")
    source, slot = cluster.begin_move(keys.meta, target)
    commands = [("SET", keys.weights, "new"), ("XADD", keys.log, "*", "n", "1")]
    try:
        with at.client.pipeline(transaction=True) as pipe:
            pipe.watch(keys.meta)
            assert refuse(at, lambda: transact(pipe, keys.meta, "a", commands)).about == "slot"
        assert at.client.get(keys.weights) == b"old"
        half = "redis.call('SET', KEYS[1], 'new') redis.call('XADD', KEYS[2], '*', 'n', '1')"
        with pytest.raises(redis.ResponseError):  # without the absent key it is executed half
            at.client.eval(half.replace("KEYS[2]", f"'{keys.log}'"), 1, keys.weights)
        assert at.client.get(keys.weights) == b"new"
        assert absent(keys.meta).startswith(keys.root)
    finally:
        cluster.move_keys(source, target, slot)


def test_a_moving_slot_never_looks_like_a_lost_expert(cluster: Cluster, at: Connection) -> None:
    """Half of its keys are elsewhere already: every read waits, none finds the expert damaged or gone."""
    expert = make_expert(at)
    store, keys = expert.store, expert.store.keys
    target = next(node for node in cluster.nodes if node is not cluster.master_of(keys.meta))
    source, slot = cluster.begin_move(keys.meta, target)
    source.client.execute_command("MIGRATE", "127.0.0.1", target.port, keys.weights, 0, 5000)
    reads: list[Callable[[], object]] = [
        store.load,
        store.condition,
        lambda: at.client.get(keys.weights),
        lambda: read_together(at.client, ("get", keys.weights), ("hgetall", keys.meta)),
    ]
    before = at.generation
    try:
        for read in reads:
            with pytest.raises((FedMoEError, redis.ResponseError)) as error, at.errors():
                read()
            assert type(error.value) is RedisUnavailableError
            assert error.value.about == "slot"
    finally:
        cluster.move_keys(source, target, slot)
    moved = refuse(at, lambda: list(at.stream([("GET", keys.weights)])))
    assert moved.about == "slot"  # the connection is closed
    assert store.load().meta.version == 0
    assert at.generation == before + 1


def test_a_commit_to_a_slot_that_has_moved_writes_nothing(cluster: Cluster, at: Connection) -> None:
    """The connection was loaded at the source: the state is loaded again before anything is written."""
    expert = make_expert(at)
    worker = ScriptedWorker(at, expert.spec)
    worker.push(1.0)
    entries = expert.store.read(block_ms=1, count=1)
    assert cluster.move_slot(expert.store.keys.meta) >= 6
    with pytest.raises(FedMoEError):
        expert.process(entries)
    assert expert.store.load().meta.version == 0
    expert.load()
    assert serve(expert) == ["applied"]


def test_a_moved_slot_ends_a_wait_for_updates(cluster: Cluster, at: Connection) -> None:
    """An aggregator that waits for the next entry does not wait at the old place."""
    store = make_expert(at).store
    failed: list[FedMoEError] = []

    def wait() -> None:
        try:
            store.read(block_ms=1900, count=1)
        except FedMoEError as error:
            failed.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    cluster.move_slot(store.keys.meta)
    thread.join(1.0)
    assert failed
    assert eventually("the new place", store.load).meta.version == 0


# ---- what is wrong is said


def test_uncovered_slots_are_said_and_hurt_only_their_experts(cluster: Cluster, reach: Reach) -> None:
    """cluster-require-full-coverage is no, as the pages recommend; the slot comes back, and nothing was lost."""
    connection = reach(cluster.url)
    key, *others = (connection.keys.expert(name).meta for name in (EXPERT, *"abcdefgh"))
    at = connection.at(key)
    at.client.set(key, "here")
    node = cluster.master_of(key)
    slot = at._slot
    other = next(key for key in others if cluster.master_of(key) is not node)
    for each in cluster.nodes:
        each.client.config_set("cluster-require-full-coverage", "no")
    node.client.execute_command("CLUSTER DELSLOTS", slot)
    try:
        error = refuse(at, lambda: at.client.get(key))  # the others still say that this node serves it
        assert type(error) is RedisUnavailableError
        assert error.about == "slot"
        assert f"127.0.0.1:{node.port} does not serve slot {slot}" in str(error)
        assert any("name different masters" in check.text for check in cluster_checks(connection))
        for each in cluster.nodes:
            if each is not node:
                each.client.execute_command("CLUSTER DELSLOTS", slot)
        assert f"serves slot {slot}" in str(refuse(at, lambda: at.client.get(key)))
        (covered,) = (
            check for check in cluster_checks(connection) if "slots are served by no node" in check.text
        )
        assert covered.level == FAIL
        there = connection.at(other)
        there.client.set(other, "reached")
        assert there.client.get(other) == b"reached"
    finally:
        node.client.execute_command("CLUSTER ADDSLOTS", slot)
    assert eventually("the slot", lambda: at.client.get(key)) == b"here"
    eventually(
        "all to agree", lambda: all("different" not in check.text for check in cluster_checks(connection))
    )


def test_an_address_that_clients_cannot_route_is_named(
    server: EmbeddedRedis, reach: Reach, tmp_path: Path
) -> None:
    """The cluster announces what only its own machines reach."""
    gone = free_port()
    with Cluster(
        server.server, tmp_path, masters=1, replicas=0, options=[f"cluster-announce-port {gone}"]
    ) as one:
        error = refuse(connection := reach(one.url), lambda: connection.client.get("k"))
        assert error.about == "slot"
        assert f"127.0.0.1:{gone} serves slot" in str(error)
        assert "cluster-announce-ip" in str(error)
        one.nodes[0].client.config_set("cluster-announce-port", one.nodes[0].port)
        assert eventually("the node", lambda: connection.client.set("fedmoe:experts", "1"))


def test_a_node_that_announces_no_address_is_named_by_its_port(
    server: EmbeddedRedis, reach: Reach, tmp_path: Path
) -> None:
    """It is to be reached by its hostname, and has none."""
    options = ["cluster-preferred-endpoint-type hostname"]
    with Cluster(server.server, tmp_path, masters=1, replicas=0, options=options) as one:
        (node,), connection = one.nodes, reach(one.url)
        error = refuse(connection, lambda: connection.client.get("k"))
        assert error.about == "slot"
        assert f"announces no address for its node at port {node.port}" in str(error)
        assert "cluster-announce-hostname" in str(error)
        with pytest.raises(RedisUnavailableError, match="announces no address"):
            cluster_checks(connection)
        node.client.config_set("cluster-announce-hostname", "localhost")
        assert eventually("the node", lambda: connection.client.set("fedmoe:experts", "1"))


def test_a_server_that_is_no_cluster_and_a_node_by_its_own_url(
    cluster: Cluster, server: EmbeddedRedis, reach: Reach, tmp_path: Path
) -> None:
    """Each says which URL it needs."""
    own = EmbeddedRedis(server=server.server, options=["--port", str(port := free_port())])
    with own:
        connection = reach(f"cluster://127.0.0.1:{port}")
        with raises(RedisUnfitError, about="cluster") as no_cluster:
            connection.ping()
        assert "begin the URL with redis://" in str(no_cluster.value)
    key = Connection(RedisSettings()).keys.expert(EXPERT).meta
    wrong = next(node for node in cluster.nodes if node is not cluster.master_of(key))
    connection = reach(f"redis://127.0.0.1:{wrong.port}")
    with raises(RedisUnfitError, about="cluster") as node, connection.errors():
        connection.client.get(key)
    assert "begin the URL with cluster://" in str(node.value)


def test_no_node_answers(reach: Reach) -> None:
    """Each of the URL is named with its reason."""
    one, two = free_port(), free_port()
    connection = reach(f"cluster://127.0.0.1:{one},127.0.0.1:{two}")
    error = refuse(connection, lambda: connection.client.get("k"))
    assert error.about == "slot"
    assert all(f"127.0.0.1:{port}: " in str(error) for port in (one, two))


def test_a_node_that_does_not_answer_is_passed_over(cluster: Cluster, reach: Reach) -> None:
    """It costs a connection the question's timeout, and the next one nothing."""
    connection = reach(cluster.url, 60.0)
    metas = (connection.keys.expert(name).meta for name in "abcdefgh")
    key = next(key for key in metas if cluster.master_of(key) is not cluster.nodes[0])
    cluster.nodes[0].signal(signal.SIGSTOP)
    try:
        begin = time.monotonic()
        connection.at(key).ping()
        assert QUESTION_TIMEOUT_S <= time.monotonic() - begin < 15
        connection.at(key).client.connection_pool.disconnect()
        begin = time.monotonic()
        connection.at(key).ping()
        assert time.monotonic() - begin < QUESTION_TIMEOUT_S
    finally:
        cluster.nodes[0].signal(signal.SIGCONT)
    eventually("the cluster", cluster.is_whole)


def test_a_node_that_knows_of_no_failover_is_asked_last(cluster: Cluster, reach: Reach) -> None:
    """It is cut off from the others, and names a master that is down."""
    gone = free_port()
    view = b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n" % gone

    class CutOff(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while asked := self.request.recv(65536):
                self.request.sendall(view if b"SLOTS" in asked else b"+OK\r\n" * asked.count(b"*"))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), CutOff) as node:
        node.daemon_threads = True
        threading.Thread(target=node.serve_forever, daemon=True).start()
        try:
            there = reach(f"cluster://127.0.0.1:{node.server_address[1]},{cluster.hosts}", 5.0)
            with pytest.raises(RedisUnavailableError, match=str(gone)):
                there.ping()
            there.ping()
            there.close()
        finally:
            node.shutdown()


def test_all_connections_of_a_thread_are_cut_off_together(cluster: Cluster, reach: Reach) -> None:
    """Also those that are made afterwards."""
    connection = reach(cluster.url)
    key = connection.keys.expert(EXPERT).meta
    connection.at(key).ping()
    connection.cut_off()
    for there in (connection.at(key), connection.at(connection.keys.expert("another").meta)):
        assert refuse(there, there.client.ping).about == "stop"


def test_experts_of_one_slot_share_a_connection(cluster: Cluster, reach: Reach) -> None:
    """On one server all do, and `at` gives the connection itself."""
    connection = reach(cluster.url)
    keys = connection.keys.expert(EXPERT)
    assert connection.at(keys.meta) is connection.at(keys.updates) is connection.at(keys.meta).at(keys.log)
    assert connection.at(connection.keys.experts) is connection
    assert ExpertStore(connection, EXPERT).connection is connection.at(keys.meta)
    assert connection.connections_made == 0
    connection.at(keys.meta).ping()
    assert connection.connections_made == 1
