"""What a server says about itself in INFO, for people and judged; of a Redis Cluster, what its masters say."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from redis.exceptions import NoPermissionError

from fedmoe.errors import RedisUnavailableError
from fedmoe.protocol.eviction import eviction_threat
from fedmoe.protocol.federation import MEMORY_ALARM, ServerView
from fedmoe.store.connection import Connection
from fedmoe.store.reading import ask
from fedmoe.util.check import FAIL, OK, WARN, Check

OLDEST = (7, 0)
_MUST_BE_OK = ("rdb_last_bgsave_status", "aof_last_write_status", "aof_last_bgrewrite_status")


def read_info(connection: Connection) -> Mapping[str, Any] | Exception:
    """The reply to INFO, or the error reply. Of a cluster it is that of the fullest master, with everybody's faults.

    Raises:
        RedisUnavailableError: if no server replies.
    """
    infos: list[Any] = []
    failed: RedisUnavailableError | None = None
    for master in connection.masters():
        try:
            infos.append(ask(master, {"info": ("INFO",)})["info"])
        except RedisUnavailableError as error:
            failed = error
    said = [info for info in infos if not isinstance(info, Exception)]
    if not said:
        if failed and not infos:
            raise failed
        refused: Exception = infos[0]
        return refused
    return together(said)


def together(infos: list[dict[str, Any]]) -> dict[str, Any]:
    """One INFO of several masters: the fullest one's, all clients, and what is not in order anywhere. Pure."""
    found = dict(sorted(infos, key=_share)[-1])
    if len(infos) > 1:
        found["connected_clients"] = sum(info.get("connected_clients", 0) for info in infos)
    for name in _MUST_BE_OK:
        bad = [info[name] for info in infos if info.get(name, "ok") != "ok"]
        found |= {name: bad[0]} if bad else {}
    if any(info.get("aof_enabled") == 0 for info in infos):
        found["aof_enabled"] = 0
    return found


def _share(info: dict[str, Any]) -> tuple[float, int]:
    used, bound = info.get("used_memory", 0), info.get("maxmemory", 0)
    return (used / bound if bound else 0.0, used)


def clock_of(info: Mapping[str, Any] | Exception) -> float:
    """The server's clock (seconds since 1970), or this machine's if INFO does not give it."""
    microseconds = None if isinstance(info, Exception) else info.get("server_time_usec")
    return microseconds / 1e6 if isinstance(microseconds, int) else time.time()


def server_view(
    connection: Connection, info: Mapping[str, Any] | Exception, now: float, latency_s: float | None
) -> ServerView:
    """The server for people: its INFO, its clock (seconds since 1970), and the seconds that one command took."""
    ends = connection.certificate_ends
    server = ServerView(
        url=connection.settings.shown,
        certificate_ends=ends,
        certificate_left_s=None if ends is None else max(0.0, ends - time.time()),
        latency_s=latency_s,
    )
    if isinstance(info, Exception):
        return server
    valkey = info.get("valkey_version")
    saved_at = info.get("rdb_last_save_time")
    return replace(
        server,
        software=f"Valkey {valkey}" if valkey else f"Redis {info.get('redis_version')}",
        used_memory=info.get("used_memory"),
        max_memory=info.get("maxmemory"),
        policy=info.get("maxmemory_policy"),
        persists=_persists(info),
        clients=info.get("connected_clients"),
        uptime_s=info.get("uptime_in_seconds"),
        is_aof_on=bool(info["aof_enabled"]) if "aof_enabled" in info else None,
        saved_s=max(0.0, now - saved_at) if isinstance(saved_at, int) else None,
        unsaved=info.get("rdb_changes_since_last_save"),
    )


def why_empty(info: Mapping[str, Any] | Exception, database: int) -> str:
    """Why a server may show no federation although there is one, "" if nothing says so. Pure."""
    if isinstance(info, Exception):
        return ""
    if info.get("role") == "slave":
        synced = info.get("master_link_status") == "up"
        state = "" if synced else " that has not synchronised with its master yet"
        return f"there are no experts here, but this is a replica{state}: use the URL of the master"
    others = [name[2:] for name in info if name.startswith("db") and name[2:].isdigit()]
    if others and str(database) not in others:
        return (
            f"there are no experts: database {database} of this server is empty, keys are in database "
            f"{', '.join(others)}: correct the database in the URL, or start `fedmoe aggregator run`"
        )
    return ""


def _persists(info: Mapping[str, Any]) -> bool | None:
    states = {info.get(name) for name in ("rdb_last_bgsave_status", "aof_last_write_status")} - {None}
    return states == {"ok"} if states else None


def info_checks(connection: Connection) -> list[Check]:
    """The checks of one server's INFO."""
    info = ask(connection, {"info": ("INFO",)})["info"]
    if not isinstance(info, Exception):
        if "maxmemory_policy" not in info:  # some managed servers leave it out
            said = ask(connection, {"policy": ("CONFIG GET", "maxmemory-policy")})["policy"]
            if isinstance(said, Mapping) and "maxmemory-policy" in said:
                info = {**info, "maxmemory_policy": said["maxmemory-policy"]}
        return server_checks(info, connection.settings.shown)
    why = (
        "this user may not run INFO"
        if isinstance(info, NoPermissionError)
        else "the server does not answer INFO"
    )
    return [Check(WARN, "redis", f"answers; version and memory are not checked: {why}")]


def server_checks(info: Mapping[str, Any], url: str = "") -> list[Check]:
    """Judge a server by its reply to INFO. Pure."""
    name, version = (
        ("Valkey", info["valkey_version"])
        if "valkey_version" in info
        else ("Redis", info.get("redis_version", "of an unknown version"))
    )
    checks = [Check(OK, "redis", f"{name} {version}")]
    numbers = [int(part) for part in str(info.get("redis_version", "")).split(".")[:2] if part.isdigit()]
    if numbers and tuple(numbers) < OLDEST:
        checks = [Check(FAIL, "redis", f"{name} {version} is too old: 7.0 or later is needed")]
    if info.get("role") == "slave":
        checks.append(Check(FAIL, "redis", "this is a read-only replica: use the URL of the master"))
    if info.get("cluster_enabled") and not url.startswith("cluster://"):
        checks.append(
            Check(FAIL, "redis", "this is a node of a Redis Cluster: begin the URL with cluster://")
        )
    return [*checks, _memory(info, url), *_durability(info)]


def _memory(info: Mapping[str, Any], url: str) -> Check:
    bound = info.get("maxmemory", 0)
    if "maxmemory_policy" not in info:
        return Check(
            WARN,
            "memory",
            "neither INFO nor CONFIG GET tells maxmemory-policy: see for yourself that it is noeviction, because "
            "others throw away updates and experts when Redis is full",
        )
    if threat := eviction_threat(info.get("maxmemory_policy", ""), url):
        # Without maxmemory nothing is evicted yet; once it is set, keys are.
        return Check(FAIL if bound else WARN, "memory", threat)
    if not bound:
        return Check(
            WARN,
            "memory",
            "no maxmemory is set: set it to half the machine's memory, else the system may kill Redis",
        )
    share = info.get("used_memory", 0) / bound
    if share > MEMORY_ALARM:
        return Check(
            FAIL if share >= 1 else WARN,
            "memory",
            f"{share:.0%} of maxmemory is used: raise it, a full Redis takes no updates",
        )
    return Check(OK, "memory", f"noeviction, {share:.0%} of {bound / 2**30:.1f} GiB used")


def _durability(info: Mapping[str, Any]) -> list[Check]:
    broken = [
        f"{what} ({state})"
        for what in ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")
        if (state := info.get(what, "ok")) != "ok"
    ]
    if broken:
        return [
            Check(FAIL, "durability", f"Redis cannot write to its disk: {', '.join(broken)}; see its log")
        ]
    if not info.get("aof_enabled"):
        return [
            Check(
                WARN,
                "durability",
                "appendonly is off, so a restart loses all writes since the last snapshot: set appendonly yes",
            )
        ]
    return [Check(OK, "durability", "appendonly is on")]
