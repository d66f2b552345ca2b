"""Reads the workers of each expert: those alive, and how and when others left.

One SCAN finds them all, on a Redis Cluster one on each master; only known fields of a heartbeat are read. The age of a
heartbeat or trace is derived from its key's expiry, so that no two clocks are compared.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import NoPermissionError

from fedmoe.errors import RedisUnavailableError, create_from_zero
from fedmoe.protocol.beat import SHORT_FIELDS, Beat
from fedmoe.protocol.federation import GoneWorker, WorkerView
from fedmoe.protocol.names import MAX_NAME_LENGTH
from fedmoe.protocol.records import HEARTBEAT_TTL_S, TRACE_TTL_S, VANISHED
from fedmoe.store.connection import Connection
from fedmoe.store.reading import Command, ask, why
from fedmoe.util.text import printable

SHOWN_WORKERS = 1000
_TRACE = ("how", "reason", "host")
_HEARTBEAT_KEY = re.compile(rb"[^{]*\{([^}]*)\}:worker:(.+)", re.DOTALL)
_TRACE_KEY = re.compile(rb"[^{]*\{([^}]*)\}:payload:([^:]+):trace", re.DOTALL)

Found = dict[bytes, tuple[str, str]]  # key -> expert, worker


@dataclass(slots=True)
class Members:
    """The workers of one expert: those with a heartbeat, and the traces of workers."""

    alive: list[WorkerView] = field(default_factory=list)
    traces: dict[str, GoneWorker] = field(default_factory=dict)

    def left(self, decided: Iterable[str]) -> tuple[GoneWorker, ...]:
        """Workers without a heartbeat that have a decided update or a trace, sorted by name."""
        here = {worker.name for worker in self.alive}
        gone = {name: GoneWorker(name=name) for name in decided} | self.traces
        return tuple(gone[name] for name in sorted(gone.keys() - here)[:SHOWN_WORKERS])


def read_members(
    connection: Connection, experts: Sequence[str], problems: list[str]
) -> dict[str, Members] | None:
    """The workers of each expert, None if this user may not look for them; findings are added to `problems`."""
    if (both := _find(connection, experts, problems)) is None:
        return None
    alive, gone = both
    for what, found in (("heartbeats", alive), ("workers that left", gone)):
        if len(found) > SHOWN_WORKERS:
            problems.append(f"there are {len(found)} {what}, of which only {SHOWN_WORKERS} are shown")
    members: dict[str, Members] = {name: Members() for name in experts}
    for key, beat, ttl_ms in _read(connection, alive, SHORT_FIELDS):
        expert, name = alive[key]
        if isinstance(beat, Exception):
            problems.append(f"{expert}: the heartbeat of {name} cannot be read: {why(beat)}")
        elif ttl_ms != -2:  # -2: the heartbeat expired after the SCAN
            members[expert].alive.append(_worker(expert, name, beat, ttl_ms))
    for key, trace, ttl_ms in _read(connection, gone, _TRACE):
        expert, name = gone[key]
        if not isinstance(trace, Exception) and ttl_ms != -2:
            members[expert].traces[name] = _gone(name, trace, ttl_ms)
    return members


def _find(connection: Connection, experts: Sequence[str], problems: list[str]) -> tuple[Found, Found] | None:
    """Find the keys of all heartbeats and traces, with expert and worker; None if this user may not SCAN."""
    alive: Found = {}
    gone: Found = {}
    orphans: dict[str, str] = {}
    try:
        for key in _scan(connection, problems):
            found = alive
            if not (match := _HEARTBEAT_KEY.fullmatch(key)):
                found = gone
                if not (match := _TRACE_KEY.fullmatch(key)):
                    continue
            worker = printable(match[2], MAX_NAME_LENGTH)
            if match[1].decode(errors="replace") in experts:
                found[key] = (match[1].decode(), worker)
            elif found is alive:
                orphans[printable(match[1], MAX_NAME_LENGTH)] = worker
    except RedisUnavailableError as error:
        if not isinstance(error.__cause__, NoPermissionError):
            raise
        problems.append("the workers cannot be read: this user may not SCAN")
        return None
    problems += _of_orphans(connection, orphans)
    return alive, gone


def _scan(connection: Connection, problems: list[str]) -> Iterator[bytes]:
    """The keys that look like heartbeats and traces, on each server that holds keys."""
    pattern, masters = connection.keys.expert("*").members, connection.masters()
    for master in masters:
        try:
            with master.errors():
                yield from master.client.scan_iter(match=pattern, count=1000)
        except RedisUnavailableError as error:
            if len(masters) == 1 or isinstance(error.__cause__, NoPermissionError):
                raise
            problems.append(f"some workers cannot be read: {error}")


def _of_orphans(connection: Connection, orphans: Mapping[str, str]) -> list[str]:
    """Findings about experts that have a worker but are not listed."""
    replies = ask(
        connection,
        {name: ("HMGET", connection.keys.expert(name).meta, "version", "removed") for name in orphans},
    )
    problems = []
    for name, worker in sorted(orphans.items()):
        found = replies[name]
        version, removed = (None, None) if isinstance(found, Exception) else found
        if removed is not None:
            problems.append(
                f"expert {name} was removed, and worker {worker} ends at its next sync: nothing to do"
            )
        elif version is not None:
            problems.append(
                f"expert {name} is in Redis and not listed in {connection.keys.experts}: an aggregator that serves it "
                f"lists it again; if none does, start one: fedmoe aggregator run --expert {name}"
            )
        else:
            problems.append(
                f"expert {name} is not in Redis, but worker {worker} trains it: restore a backup (fedmoe restore), or "
                f"create it from zero ({create_from_zero(name)})"
            )
    return problems


def _read(
    connection: Connection, found: Found, fields: Sequence[str]
) -> Iterable[tuple[bytes, Any, int | Exception]]:
    """For each worker shown: key, fields (an error for a key of the wrong type), milliseconds to its expiry."""
    shown = sorted(found, key=lambda key: found[key])[:SHOWN_WORKERS]
    commands: dict[tuple[bytes, str], Command] = {}
    for key in shown:
        commands[key, "fields"] = ("HMGET", key, *fields)
        commands[key, "ttl_ms"] = ("PTTL", key)
    replies: Mapping[Any, Any] = ask(connection, commands)
    return [(key, replies[key, "fields"], replies[key, "ttl_ms"]) for key in shown]


def _ago(ttl_ms: int | Exception, of_s: float) -> float | None:
    """Seconds since a key with a lifetime of `of_s` seconds was written; None if it has no expiry."""
    return max(0.0, of_s - ttl_ms / 1000) if isinstance(ttl_ms, int) and ttl_ms >= 0 else None


def _gone(name: str, trace: Sequence[bytes | None], ttl_ms: int | Exception) -> GoneWorker:
    said = dict(zip(_TRACE, trace, strict=True))
    return GoneWorker(
        name=name,
        how=printable(said["how"] or b"", MAX_NAME_LENGTH) or VANISHED,
        reason=printable(said["reason"] or b""),
        host=printable(said["host"] or b"", MAX_NAME_LENGTH),
        ago_s=_ago(ttl_ms, TRACE_TTL_S),
    )


def _worker(expert: str, name: str, beat: Sequence[bytes | None], ttl_ms: int | Exception) -> WorkerView:
    said = Beat.read(dict(zip(SHORT_FIELDS, beat, strict=True)))
    return WorkerView(
        expert=expert,
        name=name,
        last_seen_s=_ago(ttl_ms, HEARTBEAT_TTL_S),
        since=said.since,
        run=printable(said.run, MAX_NAME_LENGTH),
        host=printable(said.host, MAX_NAME_LENGTH),
        pid=said.pid,
        software=printable(said.software),
        step=said.step,
        loss=said.loss,
        tokens_per_s=said.tokens_per_s,
        base_version=said.base_version,
        staleness=said.staleness,
        in_flight=said.in_flight,
        published=said.published,
        refused=said.refused,
        problem=printable(said.problem),
    )
