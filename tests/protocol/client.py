"""A client of the model's Redis, which the project's own stores take for redis-py.

Instead of sending a request it asks its `Port`, which answers from a list of replies that are known already and raises
`Suspended` with the request when the list is at its end. So the real code, run again from the start of its turn with
one reply more, is a step machine whose steps are single commands and transactions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import redis

from fedmoe.store.copies import COPY
from tests.protocol.world import KEYS, NO_GROUP, Command, Pairs, Reply, Request, Suspended


class Port:
    """Where a client's requests go: answered from `replies` as far as they reach."""

    def __init__(self, replies: Sequence[Reply]) -> None:
        self._replies = iter(replies)
        self.generation = 0

    def ask(self, request: Request) -> tuple[Any, ...]:
        """The answers to a request; raises Suspended, or what redis-py raises for a lost reply or a broken WATCH."""
        reply = next(self._replies, None)
        if reply is None:
            raise Suspended(request)
        self.generation += reply.reconnected
        match reply.error:
            case "lost":
                raise redis.ConnectionError("connection lost")
            case "watch":
                raise redis.WatchError("watched key changed")
        return reply.values


def _bytes(text: str | bytes | None) -> bytes | None:
    return text.encode() if isinstance(text, str) else text


def _hash(pairs: Pairs) -> dict[bytes, bytes]:
    return {k.encode(): v.encode() if isinstance(v, str) else v for k, v in pairs}


def _entries(found: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    if found == NO_GROUP:
        raise redis.ResponseError(NO_GROUP)
    return [(entry_id.encode(), _hash(fields)) for entry_id, fields in found]


def streamed(command: Sequence[Any]) -> Command:
    """A command of a stream of commands, as the model's Redis has it."""
    if command[0] != "EVAL":
        return tuple(command)
    _, script, _, source, name, length, _ = command
    assert script == COPY
    return ("COPY", source, name, length)


def _pairs(mapping: Mapping[str, Any]) -> Pairs:
    return tuple(
        sorted((key, value if isinstance(value, bytes) else str(value)) for key, value in mapping.items())
    )


class Client:
    """The part of redis.Redis that the stores use. Each method is one request."""

    def __init__(self, port: Port, *, group_start: str = "0", watches: bool = True) -> None:
        self.port = port
        self.group_start = group_start
        self.watches = watches

    def _one(self, *command: Any, watched: bool = False) -> Any:
        return self.port.ask(Request((command,), watched))[0]

    def pipeline(self, transaction: bool = True) -> "Pipeline":
        return Pipeline(self)

    def get(self, key: str) -> bytes | None:
        return self._one("GET", key)

    def getrange(self, key: str, start: int, end: int) -> bytes:
        return self._one("GETRANGE", key, start, end)

    def hget(self, key: str, field: str) -> bytes | None:
        return _bytes(self._one("HGET", key, field))

    def hgetall(self, key: str) -> dict[bytes, bytes]:
        return _hash(self._one("HGETALL", key))

    def exists(self, *keys: str) -> int:
        return self._one("EXISTS", *keys)

    def mget(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        return self._one("MGET", *keys)

    def strlen(self, key: str) -> int:
        return self._one("STRLEN", key)

    def set(self, key: str, value: Any, px: int) -> None:
        self._one("SETPX", key, bytes(value))

    def unlink(self, *keys: str) -> None:
        self._one("UNLINK", *keys)

    def scan_iter(self, match: str, count: int) -> list[bytes]:
        """There are no heartbeats."""
        return [] if ":worker:" in match else [key.encode() for key in self._one("SCAN", match)]

    def hkeys(self, key: str) -> list[bytes]:
        """The list of experts, for a sentence."""
        return []

    def info(self, section: str) -> dict[str, int]:
        """A server without a memory limit."""
        return {}

    def register_script(self, script: str) -> Any:
        assert "PEXPIRE" in script or "DEL" in script
        return lambda keys, args: self._one("LEASE", args[0])

    def xgroup_create(self, key: str, group: str, *, id: str, mkstream: bool) -> None:  # noqa: A002  # redis-py's name
        if not self._one("GROUP", key, self.group_start):
            raise redis.ResponseError("BUSYGROUP")

    def xautoclaim(self, key: str, group: str, consumer: str, **_: Any) -> list[Any]:
        return [b"0-0", _entries(self._one("XAUTOCLAIM", key)), []]

    def xreadgroup(self, group: str, consumer: str, streams: Mapping[str, str], **_: Any) -> list[Any]:
        key = next(iter(streams))
        return [[key.encode(), _entries(self._one("XREADGROUP", key))]]


class Pipeline:
    """The part of redis-py's pipeline that the stores use: immediate after `watch`, queueing after `multi`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._queue: list[Command] = []
        self._parsers: list[Any] = []
        self._watching = self._immediate = False
        self._parts: tuple[str, ...] = ()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def watch(self, *keys: str) -> None:
        self._immediate = True
        self._watching = self._client.watches
        if self._watching:
            self._parts += tuple(self._client._one("WATCH", *keys, watched=True))

    def eval(self, script: str, n_keys: int, meta: str, *others: str) -> Any:
        """The script that looks at the head, at types, which never change here, and at lengths, which are small."""
        assert self._immediate
        assert n_keys == 1 + len(others)
        head, parts = self._client._one("HMGET", meta, "commit", "parts", watched=self._watching)
        types = [b"hash", b"hash", b"hash", b"stream", b"stream", b"string", b"string", b"string"]
        assert len(types) == len(others)
        return [_bytes(head), types, [0] * len(others), _bytes(parts)]

    def multi(self) -> None:
        self._immediate = False

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        values = self._client.port.ask(Request(tuple(self._queue), self._watching, self._parts))
        return [parse(value) for parse, value in zip(self._parsers, values, strict=True)]

    def _add(self, *command: Any, parse: Any = lambda value: value) -> None:
        self._queue.append(command)
        self._parsers.append(parse)

    def get(self, key: str) -> None:
        self._add("GET", key)

    def getrange(self, key: str, start: int, end: int) -> None:
        self._add("GETRANGE", key, start, end)

    def incr(self, key: str) -> None:
        self._add("INCR", key)

    def pexpire(self, key: str, ms: int, nx: bool = False) -> None:
        self._add("EXPIRE", key)

    def persist(self, key: str) -> None:
        self._add("PERSIST", key)

    def strlen(self, key: str) -> None:
        self._add("STRLEN", key)

    def set(self, key: str, value: Any, ex: int = 0, nx: bool = False) -> None:
        if nx:
            self._add("SETNX", key, str(value).encode())
            return
        self._add("SET", key, str(value).encode() if isinstance(value, str | int) else bytes(value))

    def unlink(self, *keys: str | bytes) -> None:
        self._add("UNLINK", *(key.decode() if isinstance(key, bytes) else key for key in keys))

    def hget(self, key: str, field: str) -> Any:
        if self._immediate:
            return _bytes(self._client._one("HGET", key, field, watched=self._watching))
        return self._add("HGET", key, field, parse=_bytes)

    def exists(self, *keys: str) -> Any:
        if self._immediate:
            return self._client._one("EXISTS", *keys, watched=self._watching)
        return self._add("EXISTS", *keys)

    def hlen(self, key: str) -> None:
        self._add("HLEN", key)

    def mget(self, *keys: Any) -> Any:
        if self._immediate:
            return self._client._one("MGET", *keys[0], watched=self._watching)
        return self._add("MGET", *keys)

    def type(self, key: str) -> Any:
        """Types never change here."""
        if self._immediate:
            return b"hash" if key == KEYS.meta else b"stream"
        return self._add("TYPE", key)

    def hgetall(self, key: str) -> Any:
        if self._immediate:
            return _hash(self._client._one("HGETALL", key, watched=self._watching))
        return self._add("HGETALL", key, parse=_hash)

    def hmget(self, key: str, fields: Sequence[str]) -> None:
        self._add("HMGET", key, *fields, parse=lambda values: [_bytes(value) for value in values])

    def hset(
        self, key: str, field: str = "", value: Any = "", mapping: Mapping[str, Any] | None = None
    ) -> None:
        if mapping is None:
            self._add("HSETONE", key, field, str(value))
        else:
            self._add("HSET", key, _pairs(mapping))

    def xadd(self, key: str, fields: Mapping[str, Any], **_: Any) -> None:
        self._add("XADD", key, _pairs(fields), parse=_bytes)

    def xrange(self, key: str, first: str, last: str) -> None:
        self._add("XRANGE", key, first, parse=_entries)

    def xrevrange(self, key: str, last: str, first: str, count: int) -> None:
        self._add("XREVRANGE", key, parse=_entries)

    def xack(self, key: str, group: str, *ids: str) -> None:
        self._add("XACK", key, *ids)

    def xdel(self, key: str, *ids: str) -> None:
        self._add("XDEL", key, *ids)
