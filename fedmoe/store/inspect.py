"""Reads a whole federation without changing anything; a read-only user (`+@read`) is enough.

Whatever is missing, of the wrong type, malformed or not this user's to read is said for the expert it belongs
to; all the rest is shown. Never KEYS but one SCAN for all workers, and of a heartbeat only the known fields.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import redis
from redis.exceptions import NoPermissionError

from fedmoe.errors import SpecError
from fedmoe.federation import DeadLetter, ExpertView, Federation, GatewayView, ServerView, WorkerView
from fedmoe.keys import GROUP
from fedmoe.names import MAX_NAME_LENGTH, RESERVED_EXPERTS, is_name
from fedmoe.records import HEARTBEAT_TTL_S, Meta
from fedmoe.store.connection import Connection

SHOWN_DEAD, SHOWN_LOG, SHOWN_WORKERS = 3, 5, 1000
MAX_TEXT_CHARS = 300
DENIED = "this user may not"
_BEAT = (
    "run", "host", "pid", "since", "step", "loss", "tokens_per_s", "base_version", "staleness", "in_flight",
    "published", "refused",
)  # fmt: skip
_KEY_OF = {"groups": "updates", "last_dead": "dead", "lease_ms": "lease"}

Command = tuple[str | bytes | int, ...]


class Inspector:
    """Reads a federation over one connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.keys = connection.keys
        self._redis = connection.client

    def federation(self) -> Federation:
        """The federation as it is now.

        Raises:
            RedisUnavailableError: if Redis does not answer, or refuses to list the experts.
        """
        problems: list[str] = []
        weights = self._experts(problems)
        commands: dict[tuple[str, str], Command] = {("", "info"): ("INFO",)}
        for name in (*weights, "gateway"):
            commands |= {(name, what): command for what, command in self._commands(name).items()}
        replies = self._ask(commands)
        workers = self._workers(list(weights), problems)

        def of(name: str) -> dict[str, Any]:
            return {what: reply for (owner, what), reply in replies.items() if owner == name}

        experts = tuple(
            self._expert(name, weight, of(name), workers.get(name, ())) for name, weight in weights.items()
        )
        return Federation(
            prefix=self.keys.prefix,
            server=_server(self.connection.settings.shown, replies["", "info"]),
            experts=experts,
            gateway=_gateway(of("gateway"), experts),
            problems=tuple(problems),
        )

    def _experts(self, problems: list[str]) -> dict[str, float | None]:
        """The listed experts and their gateway weights, None for one that is not a number."""
        raw = self._ask({"experts": ("HGETALL", self.keys.experts)})["experts"]
        if isinstance(raw, Exception):
            with self.connection.errors():
                if not str(raw).startswith("WRONGTYPE"):
                    raise raw
            problems.append(f"{self.keys.experts} is not a hash: was it written by something else?")
            raw = {}
        found: dict[str, float | None] = {}
        for name, weight in sorted(raw.items()):
            if not is_name(printable(name)) or printable(name) in RESERVED_EXPERTS:
                problems.append(f"{self.keys.experts} lists {printable(name)!r}, which is no expert's name")
                continue
            found[name.decode()] = _number(weight)
            if found[name.decode()] is None:
                problems.append(f"{name.decode()}: its gateway weight is {printable(weight)!r}, not a number")
        return found

    def _commands(self, name: str) -> dict[str, Command]:
        keys = self.keys.expert(name)
        commands: dict[str, Command] = {
            "meta": ("HGETALL", keys.meta),
            "weights": ("STRLEN", keys.weights),
            "lease": ("GET", keys.lease),
            "lease_ms": ("PTTL", keys.lease),
        }
        if name == "gateway":
            return commands
        return commands | {
            "updates": ("XLEN", keys.updates),
            "groups": ("XINFO GROUPS", keys.updates),
            "dead": ("XLEN", keys.dead),
            "last_dead": ("XREVRANGE", keys.dead, "+", "-", "COUNT", SHOWN_DEAD),
            "log": ("XREVRANGE", keys.log, "+", "-", "COUNT", SHOWN_LOG),
            "applied": ("HKEYS", keys.applied),
        }

    def _ask(self, commands: Mapping[Any, Command]) -> dict[Any, Any]:
        """Send everything at once; a command that Redis refuses has its error as reply."""
        with self.connection.errors(), self._redis.pipeline(transaction=False) as pipe:
            for command in commands.values():
                pipe.execute_command(*command)
            return dict(zip(commands, pipe.execute(raise_on_error=False), strict=True))

    def _workers(self, experts: Sequence[str], problems: list[str]) -> dict[str, list[WorkerView]]:
        """The heartbeats there are, by expert."""
        key_of_worker = re.compile(rb"[^{]*\{([^}]*)\}:worker:(.+)", re.DOTALL)
        found: dict[bytes, tuple[str, str]] = {}
        orphans: dict[str, str] = {}
        pattern = self.keys.expert("*").worker("*")
        with self.connection.errors():
            try:
                for key in self._redis.scan_iter(match=pattern, count=1000):
                    match = key_of_worker.fullmatch(key)
                    if not match:
                        continue
                    worker = printable(match[2], MAX_NAME_LENGTH)
                    if match[1].decode(errors="replace") in experts:
                        found[key] = (match[1].decode(), worker)
                    else:
                        orphans[printable(match[1], MAX_NAME_LENGTH)] = worker
            except NoPermissionError:
                problems.append("the workers cannot be read: this user may not SCAN")
        problems += [
            f"{expert} is not in Redis, but worker {worker} trains it: write a backup back (fedmoe restore), or begin "
            "anew (fedmoe aggregator run --new-lineage)"
            for expert, worker in sorted(orphans.items())
        ]
        if len(found) > SHOWN_WORKERS:
            problems.append(f"there are {len(found)} heartbeats, of which only {SHOWN_WORKERS} are shown")
        shown = sorted(found, key=lambda key: found[key])[:SHOWN_WORKERS]
        commands: dict[tuple[bytes, str], Command] = {}
        for key in shown:
            commands[key, "beat"] = ("HMGET", key, *_BEAT)
            commands[key, "ttl_ms"] = ("PTTL", key)
        replies = self._ask(commands) if commands else {}
        workers: dict[str, list[WorkerView]] = {}
        for key in shown:
            expert, name = found[key]
            beat, ttl_ms = replies[key, "beat"], replies[key, "ttl_ms"]
            if isinstance(beat, redis.ResponseError):
                problems.append(f"{expert}: the heartbeat of {name} cannot be read: {_why(beat)}")
            elif ttl_ms != -2:  # it expired while we looked
                workers.setdefault(expert, []).append(_worker(expert, name, beat, ttl_ms))
        return workers

    def _expert(
        self, name: str, weight: float | None, replies: dict[str, Any], workers: Sequence[WorkerView]
    ) -> ExpertView:
        problems = _refused(replies)
        meta = _meta(replies["meta"], problems)
        if replies["weights"] == 0:
            problems.append("its weights are missing: was the key deleted?")
        waiting = replies["updates"]
        pending, lag = _group(replies["groups"], waiting)
        here = {worker.name for worker in workers}
        left = [worker for worker in map(printable, replies["applied"] or ()) if worker not in here]
        if meta:
            workers = [_behind(worker, meta.version) for worker in workers]
        return ExpertView(
            name=name,
            gateway_weight=weight,
            meta=meta,
            weights_bytes=replies["weights"],
            waiting=waiting,
            pending=pending,
            lag=lag,
            lease=_lease(replies),
            workers=tuple(workers),
            left=tuple(sorted(left)[:SHOWN_WORKERS]),
            dead=replies["dead"],
            last_dead=tuple(_dead_letter(entry) for entry in replies["last_dead"] or ()),
            log=tuple(_texts(fields) for _, fields in replies["log"] or ()),
            problems=tuple(problems),
        )


def printable(raw: bytes | str, limit: int = MAX_TEXT_CHARS) -> str:
    """What anybody may have written, safe for a terminal: what is not printable is escaped, and it is cut."""
    text = raw.decode(errors="backslashreplace") if isinstance(raw, bytes) else raw
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return safe if len(safe) <= limit and len(text) <= limit else safe[:limit] + "..."


def _texts(fields: Mapping[bytes, bytes]) -> dict[str, str]:
    return {printable(key): printable(value) for key, value in fields.items()}


def _number(raw: bytes | str | None) -> float | None:
    try:
        value = float(raw or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _whole(raw: bytes | str | None) -> int | None:
    value = _number(raw)
    return None if value is None or abs(value) > 2**53 else int(value)


def _why(error: Exception) -> str:
    """An error reply as the end of a sentence."""
    text = str(error)
    if text.startswith("WRONGTYPE"):
        return "the key is of the wrong type: was it written by something else?"
    return DENIED if isinstance(error, NoPermissionError) else printable(text)


def _refused(replies: dict[str, Any]) -> list[str]:
    """Sentences for the error replies, each of which becomes None."""
    reasons: dict[str, list[str]] = {}
    for what, reply in list(replies.items()):
        if not isinstance(reply, Exception):
            continue
        replies[what] = None
        if what == "groups" and "no such key" in str(reply):
            replies[what] = []
        elif what != "lease" or not isinstance(reply, NoPermissionError):
            # Who holds the lease may be secret (-get); whether anybody does is told by its expiry.
            reasons.setdefault(_why(reply), []).append(_KEY_OF.get(what, what))
    return [f"{', '.join(dict.fromkeys(keys))} cannot be read: {why}" for why, keys in reasons.items()]


def _meta(raw: Mapping[bytes, bytes] | None, problems: list[str]) -> Meta | None:
    if raw is None:
        return None
    if not raw:
        problems.append("its meta is missing: was the key deleted?")
        return None
    try:
        return Meta.from_hash({key: printable(value).encode() for key, value in raw.items()})
    except SpecError as error:
        problems.append(printable(str(error)))
        return None


def _group(groups: Sequence[Mapping[str, Any]] | None, waiting: int | None) -> tuple[int | None, int | None]:
    """Entries read but not committed, and entries not read.

    Redis 6.2 tells no lag, later ones none after an unread entry was deleted: what is not pending is unread.
    """
    if groups is None:
        return None, None
    ours = next((group for group in groups if group.get("name") == GROUP.encode()), None)
    pending = int(ours["pending"]) if ours else 0
    lag = ours.get("lag") if ours else None
    if lag is None and waiting is not None:
        lag = max(0, waiting - pending)
    return pending, lag


def _lease(replies: Mapping[str, Any]) -> str | None:
    """Who holds it: "" for nobody, "?" for a name this user may not read, None if nothing is known."""
    if replies["lease"]:
        return printable(replies["lease"])
    if replies["lease_ms"] is None:
        return None
    return "" if replies["lease_ms"] == -2 else "?"


def _dead_letter(entry: tuple[bytes, Mapping[bytes, bytes]]) -> DeadLetter:
    fields = _texts(entry[1])
    return DeadLetter(
        id=printable(entry[0]),
        worker=fields.get("worker", ""),
        seq=fields.get("seq", ""),
        reason=fields.get("reason", "no reason is given"),
    )


def _worker(expert: str, name: str, beat: Sequence[bytes | None], ttl_ms: int | Exception) -> WorkerView:
    said = dict(zip(_BEAT, beat, strict=True))
    seen_s = HEARTBEAT_TTL_S - ttl_ms / 1000 if isinstance(ttl_ms, int) and ttl_ms >= 0 else None
    return WorkerView(
        expert=expert,
        name=name,
        last_seen_s=None if seen_s is None else max(0.0, seen_s),
        since=_number(said["since"]),
        run=printable(said["run"] or b"", MAX_NAME_LENGTH),
        host=printable(said["host"] or b"", MAX_NAME_LENGTH),
        pid=_whole(said["pid"]),
        step=_whole(said["step"]),
        loss=_number(said["loss"]),
        tokens_per_s=_number(said["tokens_per_s"]),
        base_version=_whole(said["base_version"]),
        staleness=_whole(said["staleness"]),
        in_flight=_whole(said["in_flight"]),
        published=_whole(said["published"]),
        refused=_whole(said["refused"]),
    )


def _behind(worker: WorkerView, version: int) -> WorkerView:
    if worker.base_version is None:
        return worker
    return replace(worker, behind=max(0, version - worker.base_version))


def _gateway(replies: dict[str, Any], experts: Sequence[ExpertView]) -> GatewayView:
    problems = _refused(replies)
    meta = _texts(replies["meta"] or {})
    built_from: dict[str, int] = {}
    commits: dict[str, str] = {}
    if text := (replies["meta"] or {}).get(b"built_from"):
        try:
            for name, part in json.loads(text).items():
                built_from[printable(name)] = int(part["version"])
                commits[printable(name)] = printable(part["weights_commit"])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            problems.append("its meta is malformed: was it edited by hand?")
    present = {expert.name: expert.meta for expert in experts if expert.meta}
    exists = bool(commits) and replies["weights"] != 0
    return GatewayView(
        exists=exists,
        method=meta.get("method", ""),
        rank=_whole(meta.get("rank")),
        updated_at=_number(meta.get("updated_at")),
        relative_error=_number(meta.get("relative_error")),
        built_from=built_from,
        present={name: expert.version for name, expert in present.items()},
        outdated=tuple(n for n, expert in present.items() if commits.get(n) != expert.weights_commit),
        lease=_lease(replies),
        error=meta.get("error", ""),
        problems=tuple(problems),
    )


def _server(url: str, info: Mapping[str, Any] | Exception) -> ServerView:
    if isinstance(info, Exception):
        return ServerView(url=url)
    valkey = info.get("valkey_version")
    return ServerView(
        url=url,
        software=f"Valkey {valkey}" if valkey else f"Redis {info.get('redis_version')}",
        used_memory=info.get("used_memory"),
        max_memory=info.get("maxmemory"),
        policy=info.get("maxmemory_policy"),
    )
