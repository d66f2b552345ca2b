"""One connection to Redis: no hidden retries, a count of the connections made, and errors as sentences.

redis-py retries silently by default, so one `xadd()` can add two entries; its pool reconnects silently, so a failover
goes unnoticed. Hence this client never retries, and counts connections in `generation`: code that remembers a state of
the server compares `generation` before it relies on that state.
"""

import logging
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import redis
from hiredis import pack_command
from redis.backoff import NoBackoff
from redis.connection import PythonRespSerializer
from redis.retry import Retry

from fedmoe.errors import FedMoEError, RedisUnavailableError, RedisUnfitError
from fedmoe.protocol.keys import Keys
from fedmoe.redis_settings import RedisSettings
from fedmoe.store.certificate import earliest_end
from fedmoe.store.client import Client, asked, note, noting
from fedmoe.store.cluster import Cluster, slot_of
from fedmoe.store.credentials import login_and_tls
from fedmoe.store.limits import too_large
from fedmoe.store.redis_private import Encoder, socket_of
from fedmoe.store.refusals import explain, is_broken
from fedmoe.store.sentinel import master_client
from fedmoe.store.url import Address, ClusterURL, SentinelURL, is_this_machine, text_of, unusable

CONNECT_S = 4.0  # connection timeout; also, how long a stop may have to wait for a connection
_BUFFER_CUTOFF = 6000  # bytes; smaller parts of a command are joined before they are sent
Command = Sequence[str | int]

logger = logging.getLogger(__name__)


class Connection:
    """A client for one thread, with `generation`, the number of connections it has made so far.

    On a Redis Cluster it reaches one slot, at first that of the list of experts; `at` gives the connection to another.

    `cluster`: the Redis Cluster that the URL names, else None.
    `certificate_ends`: when the certificate of the server or its CA ends (seconds since 1970); None without TLS.

    Args:
        settings: how to reach Redis.
        node: host and port of one server, instead of those in the URL or of Sentinel's present master.
        beside: connection of the same thread to another slot or node of the cluster: both are cut off and closed
            together.
        slot: of a cluster; None for that of the list of experts.
    """

    def __init__(
        self,
        settings: RedisSettings,
        *,
        node: Address | None = None,
        beside: "Connection | None" = None,
        slot: int | None = None,
    ) -> None:
        self.settings = settings
        self.keys = Keys(settings.prefix)
        self.generation = 0
        self.certificate_ends: float | None = None
        self._made: list[Any] = []  # redis-py's connection objects; its pool reconnects the same few
        self._cut_off: threading.Event = beside._cut_off if beside else threading.Event()
        arguments = login_and_tls(settings) | {
            "protocol": 2,  # RESP2: the shape of replies does not depend on redis-py's default
            "socket_timeout": settings.timeout_s,
            "socket_connect_timeout": min(CONNECT_S, settings.timeout_s),
            "retry": Retry(NoBackoff(), 0),
            "redis_connect_func": self._on_connect,
            "command_packer": packer(),
            **_keepalive(settings.url),
        }
        self.cluster: Cluster | None = (
            beside.cluster if beside else _cluster(settings, arguments, self._log_in)
        )
        self._slot = None
        if self.cluster and not node:
            self._slot = slot_of(self.keys.experts) if slot is None else slot
        self._beside: dict[int | Address | None, Connection] = beside._beside if beside else {}
        self._beside[node or self._slot] = self
        # Any: redis-py types every reply as a union of many types.
        self.client: Any
        if self.cluster and node:
            self.client = self.cluster.client_of(node, redis_connect_func=self._on_connect)
        elif self.cluster and self._slot is not None:
            self.client = self.cluster.client(self._slot, self._on_connect)
        else:
            self.client = _client(settings.url, node, **arguments)

    def at(self, key: str) -> "Connection":
        """The connection for commands on this key, and on others of its slot: this one, except on a Redis Cluster."""
        if self.cluster is None or self._slot is None:
            return self
        slot = slot_of(key)
        return self._beside.get(slot) or Connection(self.settings, beside=self, slot=slot)

    def to(self, node: Address) -> "Connection":
        """The connection to one node of the cluster."""
        return self._beside.get(node) or Connection(self.settings, node=node, beside=self)

    def masters(self) -> list["Connection"]:
        """A connection to each server that holds keys: to every master of a Redis Cluster, else this one.

        Raises:
            RedisUnavailableError: if no node of the cluster can be asked.
        """
        if self.cluster is None:
            return [self]
        with self.errors():
            return [self.to(node) for node in self.cluster.masters()]

    @property
    def database(self) -> int:
        """The number of the database that the URL names, 0 if it names none."""
        return int(self.client.connection_pool.connection_kwargs.get("db") or 0)

    @property
    def connections_made(self) -> int:
        """The number of connections that this one and those beside it have made so far; any thread may ask."""
        return sum(one.generation for one in list(self._beside.values()))

    def _on_connect(self, connection: Any) -> None:
        if connection not in self._made:
            self._made.append(connection)
        if self._cut_off.is_set():
            raise redis.ConnectionError("told to stop")
        self._log_in(connection)
        self.generation += 1
        self.certificate_ends = earliest_end(
            socket_of(connection), getattr(connection, "ca_certs", None), getattr(connection, "ca_data", None)
        )

    def _log_in(self, connection: Any) -> None:
        """Send user and password; not as plain text to a node on another machine, which the URL does not name."""
        host = getattr(connection, "host", None) or ""  # none of a socket
        is_plain = not isinstance(connection, redis.SSLConnection)
        if is_plain and not self.settings.insecure and not is_this_machine(host):
            connection.disconnect()  # redis-py keeps it open after errors that are not its own
            raise RedisUnfitError(
                f"Redis at {self.settings.shown} names the node {text_of((host, connection.port))}, and password and "
                "updates would go there as plain text over the network: use TLS (rediss://, or ?ssl=true behind "
                "sentinel:// and cluster://), or say --insecure if the network itself is encrypted",
                about="insecure",
            )
        connection.on_connect()

    def cut_off(self) -> None:
        """Called from another thread: fail the command that waits for its reply, and every later command."""
        self._cut_off.set()
        for connection in [made for one in list(self._beside.values()) for made in one._made]:
            if (used := socket_of(connection)) is not None:
                with suppress(OSError):  # the socket was closed meanwhile
                    socket.socket.shutdown(
                        used, socket.SHUT_RDWR
                    )  # not TLS's own shutdown: a frozen server would not answer it

    def ping(self) -> None:
        """Raise RedisUnavailableError unless Redis answers."""
        with self.errors():
            self.client.ping()

    def stream(self, commands: Sequence[Command], *, ahead: int = 4) -> Generator[Any, None, None]:
        """Yield the replies in order, with up to `ahead` commands in flight.

        So processing one reply overlaps with the arrival of the next, and neither side buffers more than a few. Closing
        the generator early reads the replies in flight. A refused command's reply is its ResponseError.

        Raises:
            redis.RedisError: if the connection breaks.
        """
        pool = self.client.connection_pool
        connection = pool.get_connection()
        sent = read = 0

        def next_reply() -> Any:
            nonlocal read
            try:
                reply = connection.read_response()
            except redis.ResponseError as error:
                note(error, [commands[read]])
                reply = error
            read += 1
            return reply

        try:
            while read < len(commands):
                with noting(commands[read : read + ahead]):
                    for command in commands[sent : read + ahead]:
                        connection.send_command(*command)
                        sent += 1
                    reply = next_reply()
                yield reply
        except GeneratorExit:
            while read < sent:
                next_reply()
            raise
        finally:
            if read < sent:  # otherwise the next command would read one of these replies
                connection.disconnect()
            pool.release(connection)

    def close(self) -> None:
        """Close the connection, and those beside it; a later command makes a new one."""
        for one in self._beside.values():
            one.client.close()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn an error of redis-py into one sentence with what to do.

        Raises:
            RedisUnfitError: if the error persists until somebody changes the server, the user's rights or a key.
            RedisUnavailableError: for all other errors.
        """
        try:
            yield
        except FedMoEError:
            raise
        except (redis.RedisError, OSError) as error:
            if self._cut_off.is_set():
                raise RedisUnavailableError(
                    f"Redis at {self.settings.shown} had not answered when it was time to stop", about="stop"
                ) from error
            if isinstance(error, redis.exceptions.ReadOnlyError):
                # The master became a replica under this connection; a new one may reach the new master.
                self.client.connection_pool.disconnect()
            raise self._too_large(error) or explain(
                error, self.settings.shown, self.settings.prefix
            ) from error

    def _too_large(self, error: Exception) -> RedisUnavailableError | None:
        """The error if the server closed the connection because a value exceeds one of its limits, else None."""
        if not is_broken(error):
            return None
        return too_large(self.client, asked(error), url=self.settings.shown, prefix=self.settings.prefix)


def _cluster(
    settings: RedisSettings, arguments: dict[str, Any], log_in: Callable[[Any], None]
) -> Cluster | None:
    """The cluster that the URL names; None if it names something else."""
    if not settings.url.startswith("cluster://"):
        return None
    return Cluster(ClusterURL.parse(settings.url), settings.shown, arguments, log_in)


def _client(url: str, node: Address | None, **arguments: Any) -> redis.Redis:
    """A redis-py client for a URL, or for one node with the same login, with these connection arguments."""
    if url.startswith("sentinel://"):
        found = SentinelURL.parse(url)
        if node:
            server = dict(found.server)
            kind = redis.SSLConnection if server.pop("ssl", False) else redis.Connection
            pool = redis.ConnectionPool(kind, host=node[0], port=node[1], **server, **arguments)
            return Client(connection_pool=pool)
        tls = {name: value for name, value in arguments.items() if name.startswith("ssl_")}
        return master_client(replace(found, sentinel=tls | found.sentinel), arguments)
    try:
        client = Client.from_url(url, **arguments)
    except ValueError:  # its message may quote the password
        raise unusable(url) from None
    if node:
        pool = client.connection_pool
        if url.startswith("unix://"):  # a replica has no socket here
            pool.connection_class = redis.Connection
            pool.connection_kwargs.pop("path")
        pool.connection_kwargs.update(host=node[0], port=node[1])
    return client


class _Packer(PythonRespSerializer):
    """Sends buffers without copying them; hiredis, which copies them twice, packs commands of short words faster."""

    def pack(self, *words: Any) -> list[Any]:
        """A command as the buffers to send."""
        if not any(map(_is_long, words)) and isinstance(words[0], str) and " " not in words[0]:
            with suppress(TypeError):  # a word of a type that nothing packs; redis-py says so below
                return [pack_command(words)]
        packed: list[Any] = super().pack(*words)  # type: ignore[no-untyped-call]  # redis-py's
        return packed


def _is_long(word: Any) -> bool:
    return type(word) is not str and (
        (type(word) is bytes and len(word) > _BUFFER_CUTOFF) or isinstance(word, bytearray | memoryview)
    )


def packer() -> PythonRespSerializer:
    """What packs the commands of every connection."""
    encoder = Encoder("utf-8", "strict", decode_responses=False)  # type: ignore[no-untyped-call]  # redis-py's
    return _Packer(_BUFFER_CUTOFF, encoder.encode)


def _keepalive(url: str) -> dict[str, Any]:
    """TCP keep-alive after 30 s, so that a proxy does not close an idle connection."""
    if url.startswith("unix://"):
        return {}
    names = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
    options = {getattr(socket, name): value for name, value in names.items() if hasattr(socket, name)}
    return {"socket_keepalive": True, "socket_keepalive_options": options}


def execute(pipe: Any) -> list[Any] | None:
    """The replies to a transaction; None if a watched key changed and nothing was executed.

    A connection that breaks during a WATCH still raises, although redis-py uses the same class, WatchError, for it.
    """
    try:
        return list(pipe.execute())
    except redis.WatchError as error:
        if "occurred while watching" in str(error):
            raise
        return None
