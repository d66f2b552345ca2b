"""fedmoe.store.refusals: what passes and what does not, told from what the servers say; and how often it is said."""

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from threading import Thread

import pytest
import redis
from redis._parsers.base import BaseParser
from redis.sentinel import MasterNotFoundError

from fedmoe.errors import RedisUnavailableError, RedisUnfitError
from fedmoe.settings import RedisSettings
from fedmoe.store.client import note
from fedmoe.store.connection import Connection
from fedmoe.store.refusals import explain, is_broken
from fedmoe.util.backoff import Backoff

META = "fedmoe:{sql_expert}:meta"


def told(reply: str, *commands: tuple[object, ...]) -> RedisUnavailableError:
    error = BaseParser.parse_error(reply)
    note(error, commands)
    return explain(error, "redis://r:6379/0", "fedmoe")


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ("MOVED 3999 127.0.0.1:6381", "is a node of a Redis Cluster"),
        ("CROSSSLOT Keys in request don't hash to the same slot", "is a node of a Redis Cluster"),
        ("CLUSTERDOWN Hash slot not served", "is a node of a Redis Cluster"),
        ("WRONGPASS invalid username-password pair or user is disabled.", "refuses the login"),
        ("NOPERM this user has no permissions to access one of the keys used as arguments", f"run HGET {META}: give"),
        ("NOPERM No permissions to access a key", f"run HGET {META}: give"),
        ("NOPERM User w has no permissions to run the 'hget' command", f"run HGET {META}: give"),
        ("NOPERM User w has no permissions to run the 'xgroup|create' command", "run XGROUP CREATE: give"),
        ("ERR The user executing the script can't run this command or subcommand script: 1, on @user_script:1.",
         f"run HGET {META} (a command or key inside the script): give"),
        ("ERR unknown command 'HGET', with args beginning with: 'a' '\x00\x01' ", "has no command HGET, and"),
        ("ERR unknown command `HGET`, with args beginning with: `a`, ", "has no command HGET, and"),
        ("ERR Unknown Redis command called from script script: 1", f"that a script of FedMoE uses (HGET {META})"),
        ("WRONGTYPE Operation against a key holding the wrong kind of value",
         f"(redis-cli RENAME '{META}' '{META}.overwritten')"),
        ("ERR string exceeds maximum allowed size (proto-max-bulk-len)", f"the value of HGET {META} is too long for "),
        ("ERR max request size exceeded. Limit: 1 bytes", f"the value of HGET {META} is too long for "),
    ],
)  # fmt: skip
def test_what_needs_a_person_names_the_key_and_never_a_value(reply: str, sentence: str) -> None:
    """The words of both servers, from a command, a transaction or a script."""
    error = told(reply, ("HGET", META, b"\x00private"))
    assert isinstance(error, RedisUnfitError)
    assert sentence in str(error)
    assert "private" not in str(error)
    assert str(error).isprintable()


@pytest.mark.parametrize(
    ("reply", "about"),
    [
        ("OOM command not allowed when used memory > 'maxmemory'.", "maxmemory"),
        ("EXECABORT Transaction discarded because of: OOM command not allowed", "maxmemory"),
        ("MISCONF Redis is configured to save RDB snapshots, but it's unable to", "disk"),
        ("READONLY You can't write against a read only replica.", "replica"),
        ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", "master"),
        ("LOADING Redis is loading the dataset in memory", "loading"),
        ("NOREPLICAS Not enough good replicas to write.", "min-replicas-to-write"),
        ("ERR max number of clients reached", "maxclients"),
        ("BUSY Redis is busy running a script.", "command"),
    ],
)  # fmt: skip
def test_what_may_pass_is_tried_again(reply: str, about: str) -> None:
    """A full server or disk, a failover, a restart."""
    error = told(reply, ("SET", META, b"\x00" * 10_000))
    assert not isinstance(error, RedisUnfitError)
    assert error.about == about
    assert len(str(error)) < 200


def test_sentinel_says_itself_what_is_wrong() -> None:
    """A server that is no sentinel has no command SENTINEL; that is not for rename-command."""
    error = explain(
        MasterNotFoundError("no sentinel (unknown command 'SENTINEL')"), "sentinel://r/M", "fedmoe"
    )
    assert not isinstance(error, RedisUnfitError)
    assert str(error) == "no sentinel (unknown command 'SENTINEL')"


def test_a_connection_that_could_not_be_made_is_not_a_broken_one() -> None:
    """Only one that broke over a command can have broken because of it."""
    assert is_broken(redis.ConnectionError("Connection closed by server."))
    assert is_broken(redis.WatchError("A ConnectionError occurred while watching one or more keys"))
    assert not is_broken(redis.ConnectionError("Error 111 connecting to r:6379. Connection refused."))
    assert not is_broken(redis.TimeoutError("Timeout reading from socket"))
    assert not is_broken(redis.exceptions.BusyLoadingError())


def test_what_needs_a_person_is_said_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """And does not promise to be tried again; what passes is said every 30 s."""
    seconds = count()
    unfit, away = (
        RedisUnfitError("no XADD", about="command"),
        RedisUnavailableError("away", about="connection"),
    )
    for error, times in ((unfit, 3), (away, 5)):
        caplog.clear()
        backoff = Backoff("sync", logging.getLogger("test"), lambda: float(next(seconds)))
        for _ in range(140):
            assert backoff.failed(error) <= 1.0
        assert len(caplog.records) == times
        assert caplog.records[0].getMessage() == f"sync: {error}{'' if error is unfit else '; trying again'}"


@contextmanager
def silent_port() -> Iterator[int]:
    """What a server without TLS does with a handshake: it takes the connection, and waits for a line."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    "url", ["rediss://127.0.0.1:{}", "cluster://127.0.0.1:{}?ssl=true", "sentinel://127.0.0.1:{}/m?ssl=true"]
)
def test_a_server_without_tls_is_told_from_one_that_is_away(url: str) -> None:
    """It says nothing at all."""
    with silent_port() as port, pytest.raises(RedisUnavailableError) as caught:
        Connection(RedisSettings(url=url.format(port), timeout_s=2.0)).ping()
    assert "if it does not speak TLS at this port" in str(caught.value)


def test_a_reply_of_tls_to_plain_text_is_no_reply_of_redis() -> None:
    """Some servers drop the connection at once, others say in a message of TLS what is wrong."""

    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"\x15\x03\x01\x00\x02\x02F")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = Thread(target=answer, args=(server,))
        thread.start()
        with pytest.raises(RedisUnavailableError, match="its URL begins with rediss://") as caught:
            Connection(RedisSettings(url=f"redis://127.0.0.1:{server.getsockname()[1]}")).ping()
        thread.join()
    assert str(caught.value).isprintable()
