"""What a server refuses, as one sentence: what cannot come right by itself names the key or command and what to do."""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest

from fedmoe.errors import RedisUnavailableError, RedisUnfitError
from fedmoe.protocol.beat import Beat
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.expert import _LOOK, ExpertStore
from fedmoe.store.worker import WorkerStore
from producers import heartbeat
from tests.counting import EXPERT, CountingWorker, counting_spec, create_expert
from tests.errors import raises
from tests.federation import ScriptedWorker, make_expert, serving, small_spec
from tests.processes import eventually

LARGE = 1_500_000  # values: 5.7 MiB
ROOT = f"fedmoe:{{{EXPERT}}}"

Start = Callable[..., Connection]
As = Callable[..., Connection]


@pytest.fixture
def start(server: EmbeddedRedis) -> Iterator[Start]:
    """Start a server of its own with these options; a connection to it."""
    with ExitStack() as stack:

        def make(*options: str, url: str = "") -> Connection:
            own = stack.enter_context(EmbeddedRedis(server=server.server, options=options))
            connection = Connection(RedisSettings(url=url or own.url))
            stack.callback(connection.close)
            return connection

        yield make


def as_user(connection: Connection, *rights: str) -> Connection:
    """A connection as a user with these rights."""
    connection.client.execute_command("ACL", "SETUSER", "someone", "reset", "on", ">pw", *rights)
    url = connection.settings.url.replace("unix://", "unix://someone:pw@")
    return Connection(RedisSettings(url=url))


def unfit(call: Callable[[], object]) -> str:
    """The sentence of the RedisUnfitError that a call raises."""
    with pytest.raises(RedisUnfitError) as caught:
        call()
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_missing_command_is_named(start: Start) -> None:
    """Renamed away, also where the words behind it are a script or an update's bytes; INFO alone is not needed."""
    connection = start(
        "--rename-command", "INFO", "", "--rename-command", "XADD", "", "--rename-command", "EVAL", ""
    )
    make_expert(connection)
    worker = ScriptedWorker(connection, small_spec())
    assert " has no command XADD, and FedMoE needs it: " in unfit(lambda: worker.push(1.0))
    with pytest.raises(RedisUnfitError) as caught, connection.errors():
        connection.client.eval(_LOOK, 1, f"{ROOT}:meta")
    assert " has no command EVAL, and FedMoE needs it: " in str(caught.value)
    assert "redis.call" not in str(caught.value)


def test_a_refused_command_or_key_is_named(connection: Connection) -> None:
    """Alone, in a transaction, and EXEC itself; with where to find the rights."""
    make_expert(connection)
    spec = f"{ROOT}:spec"
    for rights, call, told in (
        (("~*", "+@all", "-get"), lambda c: ExpertStore(c, EXPERT).spec(), f"run GET {spec}: "),
        (("~fedmoe:experts", "+@all"), lambda c: ExpertStore(c, EXPERT).spec(), f"run GET {spec}: "),
        (("~*", "+@all", "-hset"), _beat, f"run HSET {ROOT}:worker:alice: "),
        (("~*", "+@all", "-multi"), _beat, "run MULTI: "),
        (("~*", "+@all", "-exec"), _beat, "run EXEC: "),
    ):
        text = unfit(partial(call, as_user(connection, *rights)))
        assert told in text
        assert text.endswith("`fedmoe doctor --acl ROLE` prints")
    connection.client.execute_command("ACL", "DELUSER", "someone")


def _beat(connection: Connection) -> None:
    WorkerStore(connection, EXPERT, "alice").beat(Beat(run="1-00000000"), ttl_s=15)


def test_a_key_that_somebody_overwrote_is_named_until_it_is_moved_away(
    connection: Connection, connect: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, with the command that mends it, by aggregator and worker; when it was run, all goes on."""
    spec = counting_spec()
    store = create_expert(connection, spec)
    with serving(connect()), CountingWorker(connect(), spec) as worker:
        eventually("an update", lambda: store.load().meta.version)
        connection.client.set(store.keys.updates, "x")
        sentence = f"the key {ROOT}:updates in Redis at {connection.settings.shown} was overwritten by something else"
        remedy = f"move it away (redis-cli RENAME '{ROOT}:updates' '{ROOT}:updates.overwritten')"
        for who in (EXPERT, "sync"):
            eventually(
                f"the sentence of {who}", lambda who=who: f"{who}: {sentence}: {remedy}" in caplog.text
            )
        connection.client.rename(store.keys.updates, f"{store.keys.updates}.overwritten")
        version = store.load().meta.version
        eventually("more updates", lambda: store.load().meta.version > version)
        worker.finish()
        assert worker.sync.ledger.queue == []
    said = [r for r in caplog.records if sentence in r.getMessage() and r.getMessage().startswith("sync")]
    assert len(said) == 1
    assert "trying again" not in said[0].getMessage()


def test_a_value_above_a_limit_is_told_with_key_limit_and_remedy(start: Start) -> None:
    """Redis ends the connection without a word; a user who may not ask for the limits is told of them all the same."""
    spec = counting_spec(LARGE)
    small = start("--proto-max-bulk-len", "1mb")
    text = unfit(lambda: create_expert(small, spec))
    assert text.startswith(
        f"{ROOT}:weights is 5.7 MiB long, and Redis at {small.settings.shown} takes at most 1.0 MiB"
    )
    assert "CONFIG SET proto-max-bulk-len 12mb" in text
    with raises(RedisUnavailableError, about="proto-max-bulk-len") as e:
        create_expert(as_user(small, "~*", "+@all", "-config"), spec)
    assert not isinstance(e.value, RedisUnfitError)
    small.client.config_set("proto-max-bulk-len", "12mb")
    create_expert(small, spec)


def test_an_output_buffer_below_the_weights_is_told_with_its_remedy(start: Start) -> None:
    """A Valkey that sends a long string without buffering it is fit as it is."""
    connection = start("--client-output-buffer-limit", "normal 1mb 0 0")
    spec = counting_spec(LARGE)
    create_expert(connection, spec)
    store = WorkerStore(connection, EXPERT, "alice")
    if "valkey_version" in connection.client.info("server"):
        with suppress(RedisUnfitError):
            store.pull(spec, known="")
        return
    text = unfit(lambda: store.pull(spec, known=""))
    assert "5.7 MiB are read at once" in text
    assert "keeps at most 1.0 MiB for a client (client-output-buffer-limit)" in text
    assert "CONFIG SET client-output-buffer-limit 'normal 23mb 0 0'" in text


def test_a_connection_that_breaks_over_something_large_is_just_a_connection(start: Start) -> None:
    """Where the server's limits are above it."""
    connection = start()
    spec = counting_spec(LARGE)
    store = create_expert(connection, spec)
    connection.client.connection_pool.disconnect()
    real = connection.client.connection_pool.get_connection

    def broken(*words: object) -> object:
        made = real(*words)
        made.read_response = _reset
        connection.client.connection_pool.get_connection = real
        return made

    connection.client.connection_pool.get_connection = broken
    with raises(RedisUnavailableError, about="connection") as caught:
        store.load()
    assert not isinstance(caught.value, RedisUnfitError)


def _reset(*_: object, **__: object) -> None:
    raise ConnectionResetError(104, "Connection reset by peer")


def test_a_node_of_a_cluster_is_told(start: Start) -> None:
    """Whatever it answers: that it does not serve the key, or who does."""
    node = start("--cluster-enabled", "yes", "--port", "0", "--cluster-port", "17391")
    assert "is a node of a Redis Cluster" in unfit(lambda: make_expert(node))


def test_a_disk_that_is_full_is_one_sentence_for_a_worker_too(
    server: EmbeddedRedis, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said once for many failed heartbeats, though polls work between them; without the bytes of a payload."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_INTERVAL_S", 0.2)
    directory = tmp_path / "redis"
    directory.mkdir()
    options = ("--appendonly", "no", "--save", "3600 1")
    with EmbeddedRedis(directory, server=server.server, options=options) as own:
        connection = Connection(RedisSettings(url=own.url))
        spec = counting_spec()
        store = create_expert(connection, spec)
        connection.client.set(store.keys.lease, "somebody")  # who does not decide
        with CountingWorker(Connection(connection.settings), spec) as worker:
            eventually("an update that waits", lambda: connection.client.xlen(store.keys.updates))
            shutil.rmtree(directory)  # no snapshot can be written any more
            connection.client.bgsave()
            eventually(
                "the failure",
                lambda: connection.client.info("persistence")["rdb_last_bgsave_status"] == "err",
            )
            eventually("failed heartbeats between polls", lambda: _rejected(connection, "hset") > 3)
            problem = worker.sync.status.problem
            with serving(Connection(connection.settings)):
                eventually("the aggregator's", lambda: f"{EXPERT}: Redis" in caplog.text)
                said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
                connection.client.config_set("stop-writes-on-bgsave-error", "no")
                eventually("it goes on", lambda: store.load().meta.version > 1)
                worker.finish()
    sentence = f"Redis at {own.url} cannot write to its disk and so takes no writes: see its log"
    assert problem == sentence
    assert said == [f"sync: {sentence}; trying again", f"{EXPERT}: {sentence}; trying again"]


def _rejected(connection: Connection, command: str) -> int:
    return int(connection.client.info("commandstats")[f"cmdstat_{command}"]["rejected_calls"])
