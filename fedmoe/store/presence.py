"""A worker's presence on its expert: it joins, sends heartbeats, and leaves.

A heartbeat also asks what a worker must know while it trains, so that an idle worker sends nothing else.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import redis

from fedmoe.protocol.beat import Beat
from fedmoe.protocol.doorbell import Join
from fedmoe.protocol.records import TRACE_TTL_S
from fedmoe.protocol.rollback import RolledBack
from fedmoe.protocol.rules import RuleSet
from fedmoe.store.connection import Connection
from fedmoe.util.software import software


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What a heartbeat found.

    Args:
        is_served: an aggregator holds the expert's lease; None if this user may not read it.
        orders: what operators decided: the rules in force, and the rollbacks; None if they cannot be read (the next
            pull then raises the error).
    """

    is_served: bool | None
    orders: tuple[RuleSet, RolledBack] | None

    @property
    def held(self) -> str:
        """Why the expert is held, "" if it is not."""
        return self.orders[0].held if self.orders else ""


class Presence:
    """Redis commands of one worker of one expert. Every method may raise RedisUnavailableError.

    Attributes:
        seen: what the last heartbeat found; None before the first.
    """

    def __init__(self, connection: Connection, expert: str, worker: str) -> None:
        self.expert = expert
        self.worker = worker
        self.keys = connection.keys.expert(expert)
        self.connection = connection.at(self.keys.meta)
        self.seen: Seen | None = None
        self._redis = self.connection.client
        self._written: Collection[str] = ()  # fields of the heartbeat that this process wrote

    def join(self) -> None:
        """Ask the aggregator to read this worker's heartbeat and pin the base model's fingerprint from it."""
        with self.connection.errors():
            self._redis.xadd(self.keys.updates, Join(worker=self.worker, software=software()).to_fields())

    def beat(self, beat: Beat, *, ttl_s: float) -> None:
        """Write the heartbeat, which expires after ttl_s, and a trace whose age later tells when it was last seen.

        Also sets `seen`, even if Redis refuses the heartbeat because it is full.
        """
        fields, ttl_ms = beat.to_fields(), int(ttl_s * 1000)
        key, trace = self.keys.worker(self.worker), self.keys.trace(self.worker)
        with self.connection.errors():
            with self._redis.pipeline(transaction=False) as pipe:
                if self._written:
                    pipe.hset(key, mapping=dict.fromkeys(self._written, "") | fields)
                    pipe.pexpire(key, ttl_ms)
                    pipe.pexpire(trace, int(TRACE_TTL_S * 1000))
                pipe.get(self.keys.lease)
                pipe.hmget(self.keys.meta, ["rules", "rolled_back"])
                *renewed, lease, orders = pipe.execute(raise_on_error=False)
            self.seen = _seen(lease, orders)
            if not _is_renewed(renewed):
                self._write_anew(key, trace, beat.host, fields, ttl_ms)
        self._written = fields.keys()

    def _write_anew(self, key: str, trace: str, host: str, fields: dict[str, str], ttl_ms: int) -> None:
        """Write heartbeat and trace in place of what is there: a predecessor's, or a key of the wrong type."""
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(key, trace)
            pipe.hset(key, mapping=fields)
            pipe.pexpire(key, ttl_ms)
            pipe.hset(trace, "host", host)
            pipe.pexpire(trace, int(TRACE_TTL_S * 1000))
            pipe.execute()

    def heartbeat(self) -> Beat | None:
        """The heartbeat under this worker's name, None if there is none."""
        with self.connection.errors():
            raw = self._redis.hgetall(self.keys.worker(self.worker))
        return Beat.read(raw) if raw else None

    def leave(self, how: str = "stopped", reason: str = "") -> None:
        """Delete the heartbeat and write a trace: how the worker left (finished, stopped, refused, failed), and why."""
        trace, self._written = self.keys.trace(self.worker), ()
        with self.connection.errors():
            self._redis.delete(self.keys.worker(self.worker))  # first: a full Redis takes no trace
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.hset(trace, mapping={"how": how, "reason": reason})
                pipe.pexpire(trace, int(TRACE_TTL_S * 1000))
                pipe.execute()


def _is_renewed(replies: list[Any]) -> bool:
    """True if a heartbeat and its trace were there and are renewed; raises the error if Redis refused to."""
    for reply in replies:
        if isinstance(reply, Exception):
            if "WRONGTYPE" not in str(reply):
                raise reply
            return False
    return bool(replies and replies[-1])


def _seen(lease: Any, orders: Any) -> Seen:
    is_served = None if isinstance(lease, redis.ResponseError) else lease is not None
    return Seen(is_served, None if isinstance(orders, redis.ResponseError) else _orders(*orders))


def _orders(rules: bytes | None, rolled_back: bytes | None) -> tuple[RuleSet, RolledBack] | None:
    """What operators decided, from the fields of meta; None if they are missing or cannot be parsed."""
    try:
        if not rules:
            return None
        return RuleSet.from_json(rules.decode()), RolledBack.from_json((rolled_back or b"[]").decode())
    except ValueError:
        return None
