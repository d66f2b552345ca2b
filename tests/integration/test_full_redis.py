"""A Redis without memory left: what was published is decided all the same, workers hold back, nothing is lost."""

import threading
from collections.abc import Callable, Iterator

import pytest
import redis
import torch

import fedmoe.store.chunks
from consumers.aggregator import ExpertServer
from consumers.create import SpecRequest, ensure_experts
from consumers.expert import Expert
from fedmoe.errors import RedisUnavailableError, StaleStateError
from fedmoe.protocol.layout import Layout
from fedmoe.settings import AggregatorSettings, RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.expert import ExpertStore
from fedmoe.store.full import read_together
from fedmoe.store.lease import Lease
from tests.errors import raises
from tests.federation import LAYOUT, ScriptedWorker, make_expert, serve, small_spec
from tests.hazards.stepping import Killed, Stepper
from tests.processes import eventually

Connect = Callable[[], Connection]


@pytest.fixture
def full(connection: Connection) -> Iterator[Callable[[], None]]:
    """Call it, and Redis is full until the test ends."""
    yield lambda: connection.client.config_set("maxmemory", 1)
    connection.client.config_set("maxmemory", 0)


@pytest.mark.parametrize("in_place", [False, True])
def test_commit_gets_out_of_a_full_redis(
    connection: Connection, full: Callable[[], None], monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    """The commit that frees memory goes through although Redis takes nothing, with all that belongs to it."""
    if in_place:
        monkeypatch.setattr(fedmoe.store.chunks, "CHUNK_BYTES", 20)
        monkeypatch.setattr(fedmoe.store.chunks, "IN_PLACE_BYTES", 1)
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    worker.push(1.0)
    full()
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        connection.client.set("anything", 1)
    assert serve(expert) == ["applied"]
    client, keys = connection.client, expert.store.keys
    assert client.xlen(keys.updates) == 0
    assert client.xlen(keys.log) == 1
    assert not client.keys("*payload*:1:*")
    assert client.hget(keys.meta, "commit").decode() == expert.meta.commit
    assert client.get(keys.weights) == bytes(expert.buffer.file)
    worker.pull()
    assert torch.equal(worker.ledger.base, expert.buffer.flat)


def test_commit_to_a_full_redis_makes_the_same_check(
    connection: Connection, connect: Connect, full: Callable[[], None]
) -> None:
    """Two aggregators, the slower one can commit nothing, full or not; and none over a connection made anew."""
    first = make_expert(connection)
    second = Expert(ExpertStore(connect(), "sql_expert"), first.spec, aggregator="second")
    second.load()
    ScriptedWorker(connection, first.spec).push(1.0)
    ScriptedWorker(connection, first.spec, "bob").push(1.0)
    full()
    entries = first.store.read(block_ms=1, count=1)
    assert [v.outcome.value for v in first.process(entries)] == ["applied"]
    with pytest.raises(StaleStateError):
        serve(second)
    entries = first.store.reclaim()
    first.store.connection.client.connection_pool.disconnect()
    with raises(StaleStateError, about="connection"):
        first.process(entries)
    first.load()
    assert serve(first) == ["applied"]
    assert first.meta.version == 2


def test_script_compares_the_commit_by_itself(connection: Connection) -> None:
    """A rival's commit between the comparison and the script: the script does nothing."""
    from fedmoe.store.full import transact

    expert = make_expert(connection)
    with connection.client.pipeline() as pipe:
        pipe.watch(expert.store.keys.meta)
        assert not transact(pipe, expert.store.keys.meta, "another", [("SET", "{sql_expert}", "1")])
        assert transact(pipe, expert.store.keys.meta, expert.meta.commit, [("SET", "{sql_expert}", "2")])
    assert connection.client.get("{sql_expert}") == b"2"


def test_rival_between_check_and_script_is_noticed(
    connection: Connection, connect: Connect, full: Callable[[], None]
) -> None:
    """A commit that slips in while a full Redis is committed to leaves the slower one with nothing."""
    expert = make_expert(connection)
    rival = Expert(ExpertStore(connect(), "sql_expert"), expert.spec, aggregator="rival")
    rival.load()
    ScriptedWorker(connection, expert.spec).push(1.0)
    entries = expert.store.read(block_ms=1, count=10)
    full()
    queue, calls = expert.store.queue, []

    def slow_queue(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == 2:  # the second time is for the script
            assert rival.process(rival.store.reclaim())
        queue(*arguments)

    expert.store.queue = slow_queue
    with pytest.raises(StaleStateError):
        expert.process(entries)
    rival.load()
    assert rival.meta.version == 1


def test_new_aggregator_serves_a_full_redis(
    connection: Connection, connect: Connect, full: Callable[[], None]
) -> None:
    """Lease, load, reclaim and commit; and the worker, too, learns what became of its update."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    worker.push(1.0)
    full()
    stop = threading.Event()
    server = ExpertServer(connect(), "sql_expert", AggregatorSettings(lease_s=1.0, block_ms=50), holder="one")
    thread = threading.Thread(target=server.run, args=(stop,))
    thread.start()
    try:
        eventually("version 1", lambda: worker.store.meta().version == 1, timeout_s=5)
    finally:
        stop.set()
        thread.join()
    change = worker.pull()
    assert [update.seq for update in change.decided] == [1]
    assert torch.equal(worker.local, torch.arange(LAYOUT.numel) + 1.0)
    worker.train(1.0)
    worker.make_update()
    with raises(RedisUnavailableError, about="maxmemory"):
        worker.publish()
    connection.client.config_set("maxmemory", 0)
    worker.publish()
    expert.load()
    assert serve(expert) == ["applied"]


def test_reads_of_a_full_redis_are_of_one_moment(
    connection: Connection, connect: Connect, full: Callable[[], None]
) -> None:
    """What changes between the reads makes them start over."""
    client = connection.client
    client.mset({"a": "1", "b": "1"})
    full()
    pipeline, changes = client.pipeline, iter([b"2", b"3"])
    other = connect().client

    def slow_pipeline(**options: object) -> object:
        pipe = pipeline(**options)
        get = pipe.get

        def slow_get(key: str) -> object:
            if key == "b" and pipe.watching and (value := next(changes, None)):
                # DEL and RENAME, say, go on when Redis is full; so does a script that may exceed the limit.
                other.eval("#!lua flags=allow-oom\nredis.call('MSET', 'a', ARGV[1], 'b', ARGV[1])", 0, value)
            return get(key)

        pipe.get = slow_get
        return pipe

    client.pipeline = slow_pipeline
    read = read_together(client, ("get", "a"), ("get", "b"))
    # Valkey takes reads inside MULTI when it is full, and then nothing came between them.
    assert read == ([b"3", b"3"] if next(changes, None) is None else [b"1", b"1"])


def test_lease_without_expiry_gets_one(connection: Connection) -> None:
    """Somebody set the lease by hand: nobody stands by for ever."""
    connection.client.set("l", "a person")
    lease = Lease(connection, "l", holder="one", ttl_ms=300)
    assert not lease.hold()
    eventually("the expiry", lease.hold, timeout_s=2)


@pytest.fixture
def small_redis(server: EmbeddedRedis) -> Iterator[Connection]:
    """A server of 24 MiB, so that updates of 2 MB fill it."""
    with EmbeddedRedis(server=server.server, options=["--appendonly", "no", "--maxmemory", "24mb"]) as redis_:
        connection = Connection(RedisSettings(url=redis_.url))
        yield connection
        connection.close()


def test_workers_hold_back_before_redis_is_full(small_redis: Connection) -> None:
    """With no aggregator the workers stop publishing in time; with one, every update gets in."""
    layout = Layout.of([("x", (500_000,))])
    expert = make_expert(small_redis, spec=small_spec(layout=layout))
    workers = [ScriptedWorker(small_redis, expert.spec, f"w{n}") for n in range(12)]
    waiting, said = [], set()
    for worker in workers:
        worker.train(0.001)
        worker.make_update()
        try:
            worker.publish()
        except RedisUnavailableError as error:
            said.add(str(error))
            waiting.append(worker)
    assert 0 < len(waiting) < 12
    assert all("nearly full and updates wait" in sentence for sentence in said)
    assert "errorstat_OOM" not in small_redis.client.info("errorstats")
    while waiting:
        assert set(serve(expert)) == {"applied"}
        for worker in list(waiting):
            try:
                worker.publish()
            except RedisUnavailableError:
                break
            waiting.remove(worker)
    serve(expert)
    assert expert.meta.version == 12


def test_update_is_not_held_back_for_nothing(small_redis: Connection) -> None:
    """If nothing waits, nothing will free memory: then Redis decides, not the worker."""
    layout = Layout.of([("x", (500_000,))])
    expert = make_expert(small_redis, spec=small_spec(layout=layout))
    used = small_redis.client.info("memory")["used_memory"]
    small_redis.client.config_set("maxmemory", used + 2_500_000)
    worker = ScriptedWorker(small_redis, expert.spec)
    worker.push(0.001)
    assert serve(expert) == ["applied"]


def test_halves_of_updates_do_not_fill_redis(small_redis: Connection) -> None:
    """Workers that publish at one moment, with room for some: those that do not fit make room again, and all get in."""
    layout = Layout.of([("x", (1_000_000,))])
    expert = make_expert(small_redis, spec=small_spec(layout=layout))
    settings = small_redis.settings
    small_redis.client.config_set("maxmemory", small_redis.client.info("memory")["used_memory"] + 9_500_000)
    stop, gate = threading.Event(), threading.Barrier(5)
    server = ExpertServer(
        Connection(settings), "sql_expert", AggregatorSettings(lease_s=1.0, block_ms=50), holder="one"
    )
    workers = [ScriptedWorker(Connection(settings), expert.spec, f"w{n}") for n in range(5)]

    def publish(worker: ScriptedWorker) -> None:
        gate.wait()
        while not stop.wait(0.1):
            try:
                worker.publish()
            except RedisUnavailableError:
                continue
            return

    for worker in workers:
        worker.train(0.0001)
        worker.make_update()
    threads = [threading.Thread(target=publish, args=(worker,)) for worker in workers]
    threads.append(threading.Thread(target=server.run, args=(stop,)))
    for thread in threads:
        thread.start()
    try:
        eventually("all five", lambda: expert.store.load().meta.version == 5, timeout_s=30)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_expert_that_nobody_has_served_yet_is_served_when_redis_is_full(
    connection: Connection, connect: Connect, full: Callable[[], None]
) -> None:
    """Its consumer group is not there yet, and can be made all the same."""
    expert = make_expert(connection)
    connection.client.delete(expert.store.keys.updates)
    worker = ScriptedWorker(connection, expert.spec)
    worker.push(1.0)
    full()
    heir = Expert(ExpertStore(connect(), "sql_expert"), expert.spec, aggregator="heir")
    heir.load()
    assert serve(heir) == ["applied"]


def test_sent_again_an_update_lives_as_long(connection: Connection, connect: Connect) -> None:
    """The reply to the XADD is lost, and the worker dies while it sends again: what waits does not expire sooner."""
    expert = make_expert(connection)
    dying = connect()
    steps = Stepper(dying)
    worker = ScriptedWorker(dying, expert.spec)
    worker.train(1.0)
    update = worker.make_update()
    steps.lose_reply(b"XADD")
    with pytest.raises(RedisUnavailableError):
        worker.publish()
    steps.kill_before(b"XADD")
    with pytest.raises(Killed):
        worker.publish()
    assert connection.client.ttl(expert.store.keys.header("alice", update.id.run, 1)) > 6 * 24 * 3600
    assert serve(expert) == ["applied"]


def test_daemon_starts_on_a_full_redis(connection: Connection, full: Callable[[], None]) -> None:
    """What it makes sure of before it serves needs no write if all is there already."""
    make_expert(connection)
    full()
    assert ensure_experts(connection, {"sql_expert": 1.0}, SpecRequest()) == []
