"""`fedmoe doctor` against a server: permissions are told without changing anything."""

from collections.abc import Callable, Iterator

import pytest

from consumers.gateway import GatewayBuilder, GatewaySettings
from fedmoe.doctor import FAIL, OK, WARN
from fedmoe.store.connection import Connection, RedisSettings
from fedmoe.store.lease import Lease
from fedmoe.store.probe import check_redis
from fedmoe.store.worker import WorkerStore
from tests.federation import ScriptedWorker, make_expert, serve, small_spec
from tests.processes import fedmoe

WORKER = (
    "resetkeys", "-@all", "+auth", "+hello", "+ping", "+multi", "+exec", "+discard", "+watch", "+unwatch",
    "%R~fedmoe:experts",
    "%R~fedmoe:{sql_expert}:*", "%RW~fedmoe:{sql_expert}:payload:alice:*", "%RW~fedmoe:{sql_expert}:worker:alice",
    "+get", "+getrange", "+strlen", "+hget", "+hmget", "+hgetall", "+hkeys", "+xrange", "+set", "+hset", "+del",
    "+pexpire", "+incrby",
    "(%W~fedmoe:{sql_expert}:updates +xadd)",
)  # fmt: skip
AGGREGATOR = ("resetkeys", "~fedmoe:*", "-@all", "+@connection", "+@read", "+@write", "+@stream", "+@transaction",
              "+@scripting", "-@dangerous", "+info")  # fmt: skip
VIEWER = ("resetkeys", "%R~fedmoe:*", "-@all", "+@read", "-get", "-getrange", "+info", "+auth", "+hello")

As = Callable[..., Connection]


@pytest.fixture
def user(connection: Connection) -> Iterator[As]:
    """Connect as a user with these rights."""

    def make(*rights: str) -> Connection:
        connection.client.execute_command("ACL", "SETUSER", "someone", "reset", "on", ">pw", *rights)
        url = connection.settings.url.replace("unix://", "unix://someone:pw@")
        return Connection(RedisSettings(url=url))

    yield make
    connection.client.execute_command("ACL", "DELUSER", "someone")


def told(connection: Connection, role: str = "", worker: str = "alice") -> list[tuple[str, str]]:
    checks, _ = check_redis(connection, stream="", worker=worker, role=role)
    return [(check.level, check.text) for check in checks if check.what == "permissions"]


def test_a_user_without_limits_may_do_everything_and_nothing_is_changed(connection: Connection) -> None:
    """Neither in an empty server nor in a living federation: not a key, not a heartbeat, not an expiry."""
    expected = [
        (OK, "this user may serve experts"),
        (OK, "this user may train {} as alice"),
        (OK, "this user may look"),
    ]
    assert told(connection) == [(level, text.format("python_expert")) for level, text in expected]
    assert list(connection.client.scan_iter()) == []
    expert = make_expert(connection)
    alice = ScriptedWorker(connection, small_spec())
    alice.push(0.5)
    serve(expert)
    alice.push(0.5)
    WorkerStore(connection, "sql_expert", "alice").beat({"run": "1-00000000"}, ttl_s=60)
    before = {key: connection.client.dump(key) for key in connection.client.scan_iter()}
    assert len(before) == 11
    assert told(connection) == [(level, text.format("sql_expert")) for level, text in expected]
    assert {key: connection.client.dump(key) for key in connection.client.scan_iter()} == before
    assert 0 < connection.client.ttl("fedmoe:{sql_expert}:worker:alice") <= 60


def test_a_worker_may_train_under_its_own_name_only(connection: Connection, user: As) -> None:
    """And what it lacks under another is listed, key by key."""
    make_expert(connection)
    alice = user(*WORKER)
    assert told(alice, role="worker") == [(OK, "this user may train sql_expert as alice")]
    serving, training, looking = told(alice)
    assert (serving[0], training[0], looking[0]) == (WARN, OK, WARN)
    ((level, text),) = told(alice, role="worker", worker="bob")
    assert level == FAIL
    assert text == (
        "this user may not train sql_expert as bob: it lacks SET fedmoe:{sql_expert}:payload:bob:*, "
        "INCRBY fedmoe:{sql_expert}:payload:bob:epoch, HSET fedmoe:{sql_expert}:worker:bob, "
        "PEXPIRE fedmoe:{sql_expert}:worker:bob, "
        "DEL fedmoe:{sql_expert}:payload:bob:*"
    )


def test_what_is_called_enough_for_a_worker_is_enough(connection: Connection, user: As) -> None:
    """The user above can in truth join, publish, poll and pull."""
    expert = make_expert(connection)
    alice = ScriptedWorker(user(*WORKER), small_spec())
    alice.store.beat({"run": "1-00000000"}, ttl_s=60)
    alice.store.join()
    update = alice.push(0.5)
    entry = alice.publish()
    assert alice.store.poll(entry, update.header).entry_waits
    assert "applied" in serve(expert)
    alice.pull()
    assert alice.ledger.meta.version == 1
    alice.store.leave()


def test_what_is_called_enough_for_an_aggregator_is_enough(connection: Connection, user: As) -> None:
    """An expert is created, served and merged by such a user; without scripts it is refused beforehand."""
    server = user(*AGGREGATOR)
    assert told(server, role="aggregator")[0][0] == OK
    expert = make_expert(server)
    ScriptedWorker(connection, small_spec()).push(0.5)
    assert serve(expert) == ["applied"]
    assert Lease(server, "fedmoe:{sql_expert}:lease", holder="a", ttl_ms=5000).hold()
    assert GatewayBuilder(server, GatewaySettings(), holder="a", lease_s=5.0).refresh()
    ((level, text),) = told(user(*AGGREGATOR, "-@scripting"), role="aggregator")[:1]
    missing = "EVALSHA fedmoe:{sql_expert}:lease, EVAL fedmoe:{sql_expert}:lease, SCRIPT LOAD"
    assert (level, text) == (FAIL, f"this user may not serve experts: it lacks {missing}")


def test_a_viewer_may_look(connection: Connection, user: As) -> None:
    """With exit code 0 for that role; the base model is the expert's."""
    make_expert(connection, base_model="org/tiny")
    viewer = user(*VIEWER)
    assert told(viewer, role="viewer") == [(OK, "this user may look")]
    url = connection.settings.url.replace("unix://", "unix://someone:pw@")
    done = fedmoe("doctor", "--redis", url, "--role", "viewer")
    assert (done.returncode, done.stderr) == (0, "")
    assert "org/tiny is not in the hub cache" in done.stdout


def test_a_user_who_may_nothing_fails(connection: Connection, user: As) -> None:
    """Without asking for a role."""
    make_expert(connection)
    assert {level for level, _ in told(user("-@all", "+auth", "+hello"))} == {FAIL}


def test_the_command_prints_a_line_each_and_its_exit_code() -> None:
    """0 without Redis, 1 with one that is not there, 2 for an impossible name; never a traceback."""
    done = fedmoe("doctor", "--no-redis")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()[:4]] == [OK] * 4
    assert "Qwen/Qwen2.5-0.5B-Instruct" in done.stdout
    done = fedmoe("doctor", "--redis", "redis://me:secret@127.0.0.1:1")
    assert (done.returncode, done.stderr) == (1, "")
    (failed,) = (line for line in done.stdout.splitlines() if line.startswith(FAIL))
    assert "cannot be reached" in failed
    assert "secret" not in done.stdout
    assert fedmoe("doctor", "--no-redis", "--name", "a:b").returncode == 2
