"""Redis Cluster: every new connection asks the cluster which master serves its slot.

The keys of one expert share a slot by their hash tag. So a plain connection to that slot's master keeps all that holds
on one server, and redis-py's RedisCluster, which repeats transactions, is not used. A slot that moved, a master that
became a replica and a cluster that is down break the connection, like a network that fails: the next one asks again.

    moved, a replica now, down     SlotError: the connection is closed
    being moved (ASK, TRYAGAIN)    the connection stays; the command is tried again later
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import redis
from redis import exceptions
from redis.crc import key_slot

from fedmoe.store.client import Client
from fedmoe.store.tls import hint_of_silence, tls_problem
from fedmoe.store.url import Address, ClusterURL, text_of

# Short, because the node that is asked may be down together with the slot's master: then the next one is asked.
QUESTION_TIMEOUT_S = 2.0
SLOTS = 16384
_NO_ANSWER = (redis.ConnectionError, redis.TimeoutError, OSError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """The slots from `first` to `last`, and the nodes that have them; a host is "?" if its node announces none."""

    first: int
    last: int
    master: Address
    replicas: tuple[Address, ...]


class SlotError(redis.ConnectionError):
    """The master of a slot is not known, not reached, or another one now; the message is for people."""


def slot_of(key: str) -> int:
    """The slot of a key: 0 to 16383."""
    return int(key_slot(key.encode(errors="surrogateescape")))


class Cluster:
    """A cluster's nodes, as far as they are known, and how to ask them who serves a slot.

    Args:
        url: names some nodes, and the login.
        shown: the URL for people.
        arguments: redis-py's connection arguments.
        log_in: called with each connection that only asks the cluster.
    """

    def __init__(
        self, url: ClusterURL, shown: str, arguments: dict[str, Any], log_in: Callable[[Any], None]
    ) -> None:
        self.shown = shown
        self._log_in = log_in
        self._arguments = arguments | url.server
        self._kind = redis.SSLConnection if self._arguments.pop("ssl", False) else redis.Connection
        self._nodes = list(url.nodes)  # the one to ask first is the first

    def client(self, slot: int, on_connect: Any) -> Client:
        """A client of a slot's master; `on_connect` is called with each new connection."""
        kind = _SlotSSLConnection if self._kind is redis.SSLConnection else _SlotConnection
        return Client(
            connection_pool=redis.ConnectionPool(
                kind, cluster=self, slot=slot, **self._arguments | {"redis_connect_func": on_connect}
            )
        )

    def client_of(self, node: Address, **arguments: Any) -> Client:
        """A client of one node, master or replica."""
        host, port = node
        pool = redis.ConnectionPool(self._kind, host=host, port=port, **self._arguments | arguments)
        return Client(connection_pool=pool)

    def master_of(self, slot: int) -> Address:
        """Host and port of the master that serves a slot.

        Raises:
            SlotError: if no node that answers knows one, or none answers.
            redis.RedisError: if the nodes refuse the question.
        """
        return self.who_says(slot)[1]

    def who_says(self, slot: int) -> tuple[Address, Address]:
        """The node that answered, and the master that it named; raises the errors of `master_of`."""
        for node, view in self.views():
            for one in view:
                if one.first <= slot <= one.last:
                    return node, self._routable(one.master)
        raise SlotError(
            f"no node of the Redis Cluster at {self.shown} serves slot {slot}: start the node that had it, or give the "
            "slot to another one (redis-cli --cluster fix)"
        )

    def masters(self) -> list[Address]:
        """The masters that serve slots; raises the errors of `master_of`."""
        return sorted({self._routable(one.master) for one in self.ranges()})

    def others(self, slot: int) -> list[Address]:
        """All nodes but the master of a slot, also those that are down or serve none; raises those errors, too."""
        node = self.master_of(slot)
        with closing(self.client_of(node, redis_connect_func=self._log_in)) as client:
            shards = client.execute_command("CLUSTER SHARDS")
        ports = ("tls-port", "port") if self._kind is redis.SSLConnection else ("port", "tls-port")
        found = []
        for shard in shards:
            for raw in _fields(shard)["nodes"]:
                one = _fields(raw)
                host = (one.get("endpoint") or one["ip"] or b"").decode() or node[0]
                found.append((host, int(next(one[name] for name in ports if name in one))))
        return sorted({*found} - {node})

    def ranges(self) -> list[Range]:
        """Who serves which slots, as the first node says that knows; raises the errors of `master_of`."""
        for _, view in self.views():
            if view:
                return view
        raise SlotError(
            f"no node of the Redis Cluster at {self.shown} serves any slot: create it (redis-cli --cluster create)"
        )

    def views(self) -> Iterator[tuple[Address, list[Range]]]:
        """What each node that answers says who serves which slots, at least one; raises the errors of `master_of`."""
        refusals: list[Exception] = []
        silent: list[str] = []
        answered = 0
        for node in list(self._nodes):
            try:
                view = self._ask(node)
            except (redis.ResponseError, exceptions.AuthenticationError) as error:
                refusals.append(error)
                continue
            except _NO_ANSWER as error:
                if tls_problem(str(error), self.shown):
                    refusals.append(error)
                silent.append(f"{text_of(node)}: {str(error).rstrip('.')}{hint_of_silence(error)}")
                self.suspect(node)
                continue
            answered += 1
            self._learn(view)
            yield node, view
        if refusals and not answered:
            raise refusals[0]
        if not answered:
            raise SlotError(f"no node of the Redis Cluster at {self.shown} answers ({'; '.join(silent)})")

    def _ask(self, node: Address) -> list[Range]:
        timeouts = {"socket_timeout": QUESTION_TIMEOUT_S, "socket_connect_timeout": QUESTION_TIMEOUT_S}
        with closing(self.client_of(node, redis_connect_func=self._log_in, **timeouts)) as client:
            rows = client.execute_command("CLUSTER SLOTS")
        found = []
        for first, last, *servers in rows:
            # A node that does not know its own address gives none: it is the one by which it was reached.
            master, *replicas = [((host or b"").decode() or node[0], port) for host, port, *_ in servers]
            found.append(Range(first=first, last=last, master=master, replicas=tuple(replicas)))
        return found

    def _learn(self, view: list[Range]) -> None:
        """Remember the nodes of a view, to ask them if those of the URL are gone."""
        for one in view:
            for node in (one.master, *one.replicas):
                if node[0] != "?" and node not in self._nodes:
                    self._nodes.append(node)

    def _routable(self, node: Address) -> Address:
        if node[0] == "?":
            raise SlotError(
                f"the Redis Cluster at {self.shown} announces no address for its node at port {node[1]}: set "
                "cluster-announce-ip there, or cluster-announce-hostname"
            )
        return node

    def suspect(self, node: Address) -> None:
        """Ask this node last from now on: it does not answer, or it may not know who serves its slots."""
        if node in self._nodes:
            self._nodes.remove(node)
            self._nodes.append(node)

    def trust(self, node: Address) -> None:
        """Ask this node first from now on."""
        if node in self._nodes:
            self._nodes.remove(node)
        self._nodes.insert(0, node)


class _SlotConnection(redis.Connection):
    """redis-py's connection, to the master that serves a slot when it connects."""

    def __init__(self, *, cluster: Cluster, slot: int, **arguments: Any) -> None:
        self._cluster = cluster
        self._slot = slot
        super().__init__(**arguments)  # type: ignore[no-untyped-call]  # redis-py's

    def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
        """Ask for the slot's master, and connect to it."""
        if self.is_connected:
            return
        said_by, node = self._cluster.who_says(self._slot)
        self.host, self.port = node
        try:
            super().connect_check_health(check_health, retry_socket_connect)
        except (redis.ConnectionError, redis.TimeoutError) as error:
            if type(error) not in (redis.ConnectionError, redis.TimeoutError):  # it answered
                raise
            self._cluster.suspect(said_by)  # it may be cut off from the cluster, and not know of a failover
            self._cluster.suspect(node)
            raise SlotError(
                f"{text_of(node)} serves slot {self._slot} of the Redis Cluster at {self._cluster.shown} and cannot be "
                f"reached ({str(error).rstrip('.')}): a replica takes its place if it is down; if it is up, let it "
                "announce an address that all can reach (cluster-announce-ip or cluster-announce-hostname, and -port)"
            ) from error

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """The next reply; one that says that the slot is elsewhere, or nowhere, closes the connection."""
        try:
            return super().read_response(*args, **kwargs)
        except (exceptions.MovedError, exceptions.ReadOnlyError, exceptions.ClusterDownError) as error:
            self.disconnect()  # type: ignore[no-untyped-call]  # redis-py's
            raise SlotError(self._elsewhere(error)) from error

    def _elsewhere(self, error: redis.ResponseError) -> str:
        node = (self.host, self.port)
        self._cluster.suspect(node)
        where = f"slot {self._slot} of the Redis Cluster at {self._cluster.shown}"
        if isinstance(error, exceptions.MovedError):
            host, port = error.node_addr
            if host != "?":
                self._cluster.trust((host or self.host, port))
            return f"{where} has moved from {text_of(node)}: the cluster is asked where it is"
        if isinstance(error, exceptions.ReadOnlyError):
            return f"{text_of(node)} had {where} and has just become a replica: the cluster is asked for the master"
        return (
            f"{text_of(node)} does not serve {where} now ({error}): its master has failed, or its slots are uncovered "
            "(redis-cli --cluster check says which)"
        )


class _SlotSSLConnection(_SlotConnection, redis.SSLConnection):
    pass


def _fields(pairs: list[Any]) -> dict[str, Any]:
    return {name.decode(): value for name, value in zip(pairs[::2], pairs[1::2], strict=True)}
