"""Is a Redis fit for FedMoE, and what may this user do there? Nothing is changed.

Whether a command is allowed is tried with arguments that cannot work (an id that is none, an option that does not
exist): Redis checks permissions first, so a refusal for want of them differs from the error that was asked for.
"""

from collections.abc import Mapping
from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

from fedmoe.doctor import FAIL, OK, WARN, Check
from fedmoe.errors import RedisUnavailableError
from fedmoe.federation import MEMORY_ALARM, Federation
from fedmoe.keys import GROUP, Keys
from fedmoe.store.connection import Connection
from fedmoe.store.inspect import Inspector
from fedmoe.store.reading import DENIED

OLDEST = (7, 0)
ROLES = ("aggregator", "worker", "viewer")
EXAMPLE_EXPERT = "python_expert"
_BAD = "no-such-thing"

Command = tuple[str | int, ...]


def server_checks(info: Mapping[str, Any]) -> list[Check]:
    """Judge what INFO says. Pure."""
    name, version = (
        ("Valkey", info["valkey_version"]) if "valkey_version" in info else ("Redis", info["redis_version"])
    )
    checks = [Check(OK, "redis", f"{name} {version}")]
    if tuple(int(part) for part in str(info["redis_version"]).split(".")[:2]) < OLDEST:
        checks = [Check(FAIL, "redis", f"{name} {version} is too old: 7.0 or later is needed")]
    if info.get("role") == "slave":
        checks.append(Check(FAIL, "redis", "this is a read-only replica: use the URL of the master"))
    if info.get("cluster_enabled"):
        checks.append(Check(FAIL, "redis", "this is a node of a Redis Cluster: use a server that is none"))
    return [*checks, _memory(info), *_durability(info)]


def _memory(info: Mapping[str, Any]) -> Check:
    bound, policy = info.get("maxmemory", 0), info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        # Without a bound nothing is evicted yet, but the day somebody sets one, it is.
        level = FAIL if bound else WARN
        return Check(level, "memory", f"maxmemory-policy {policy} throws experts away: set it to noeviction")
    if not bound:
        return Check(
            WARN,
            "memory",
            "no maxmemory: set it to half the machine's memory, else Redis may be killed for it",
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
                "appendonly is off: a restart loses all since the last snapshot: appendonly yes",
            )
        ]
    return [Check(OK, "durability", "appendonly is on")]


def check_redis(connection: Connection, *, stream: str, worker: str, role: str) -> tuple[list[Check], str]:
    """Everything about the server and this user, and the name of the experts' base model ("" if there is none yet).

    Args:
        connection: to the Redis.
        stream: a worker's expert, "" for the first there is.
        worker: a worker's name.
        role: aggregator, worker or viewer, which this user must be able to be, or "".

    Raises:
        RedisUnavailableError: if Redis cannot be reached.
    """
    info = _try(connection, ("INFO",))
    if isinstance(info, NoPermissionError):
        checks = [
            Check(WARN, "redis", "answers; version and memory are not checked, this user may not ask INFO")
        ]
    elif isinstance(info, Exception):
        with connection.errors():
            raise info
    else:
        checks = server_checks(info)
    federation, cannot_look = _look(connection)
    experts = federation.experts if federation else ()
    stream = stream or (experts[0].name if experts else EXAMPLE_EXPERT)
    checks += permission_checks(
        {
            "serve experts": _denied(connection, aggregator_commands(connection.keys, stream)),
            f"train {stream} as {worker}": _denied(
                connection, worker_commands(connection.keys, stream, worker)
            ),
            "look": cannot_look,
        },
        required=ROLES.index(role) if role else None,
    )
    base_models = [expert.meta.base_model for expert in experts if expert.meta]
    return checks, base_models[0] if base_models else ""


def permission_checks(denied: Mapping[str, list[str]], *, required: int | None) -> list[Check]:
    """A line for each role, {what it does: what it lacks}; `required` is the place of the one that must be. Pure."""
    checks = []
    useless = all(denied.values())
    for place, (does, lacks) in enumerate(denied.items()):
        if not lacks:
            checks.append(Check(OK, "permissions", f"this user may {does}"))
        elif place == required:
            checks.append(
                Check(FAIL, "permissions", f"this user may not {does}: it lacks {', '.join(lacks)}")
            )
        elif required is None:
            told = ", ".join(lacks[:3]) + (
                f" and {len(lacks) - 3} more (see --role {ROLES[place]})" if len(lacks) > 3 else ""
            )
            level = FAIL if useless else WARN
            checks.append(Check(level, "permissions", f"this user may not {does}: it lacks {told}"))
    return checks


def aggregator_commands(keys_of: Keys, expert: str) -> list[Command]:
    """What an aggregator needs, in forms that change nothing."""
    keys, gateway = keys_of.expert(expert), keys_of.gateway
    return [
        ("HSET", keys_of.experts, "a", "b", "c"),
        ("HGETALL", keys.meta),
        ("HSET", keys.meta, "a", "b", "c"),
        ("HSET", keys.applied, "a", "b", "c"),
        ("HSET", gateway.meta, "a", "b", "c"),
        ("SET", keys.weights, "", _BAD),
        ("SET", keys.packed, "", _BAD),
        ("SETRANGE", keys.weights, _BAD, ""),
        ("SETRANGE", keys.packed, _BAD, ""),
        ("STRLEN", keys.weights),
        ("STRLEN", keys.packed),
        ("SET", keys.spec, "", _BAD),
        ("SET", gateway.weights, "", _BAD),
        ("SET", keys.lease, "", _BAD),
        ("XGROUP CREATE", keys.updates, GROUP, _BAD),
        ("XREADGROUP", "GROUP", GROUP, "doctor", "COUNT", _BAD, "STREAMS", keys.updates, ">"),
        ("XAUTOCLAIM", keys.updates, GROUP, "doctor", _BAD, 0),
        ("XACK", keys.updates, GROUP, _BAD),
        ("XDEL", keys.updates, _BAD),
        ("XADD", keys.log, _BAD, "a", "b"),
        ("XADD", keys.dead, _BAD, "a", "b"),
        ("GETRANGE", keys.head("doctor", _BAD, 0), 0, 0),
        ("XINFO STREAM", keys.updates),
        ("TYPE", keys.log),
        ("DEL", keys.head("doctor", _BAD, 0)),
        ("UNLINK", keys.head("doctor", _BAD, 0)),
        ("PEXPIRE", keys.lease, _BAD),
        ("EVALSHA", _BAD, 1, keys.lease),
        ("EVAL", "return 1", 1, keys.lease),
        ("SCRIPT LOAD", "return 1"),
        ("WATCH", keys.meta),
        ("UNWATCH",),
        ("MULTI",),
        ("DISCARD",),
    ]


def worker_commands(keys_of: Keys, expert: str, worker: str) -> list[Command]:
    """What one worker needs, in forms that change nothing."""
    keys = keys_of.expert(expert)
    return [
        ("HKEYS", keys_of.experts),
        ("GET", keys.spec),
        ("STRLEN", keys.weights),
        ("GETRANGE", keys.weights, 0, 0),
        ("GETRANGE", keys.packed, 0, 0),
        ("HGETALL", keys.meta),
        ("HMGET", keys.meta, "lineage"),
        ("HGET", keys.applied, worker),
        ("XRANGE", keys.updates, _BAD, "+"),
        ("XADD", keys.updates, _BAD, "a", "b"),
        ("SET", keys.head(worker, _BAD, 0), "", _BAD),
        ("STRLEN", keys.head(worker, _BAD, 0)),
        ("INCRBY", keys.epoch(worker), _BAD),
        ("HGETALL", keys.worker(worker)),
        ("HSET", keys.worker(worker), "a", "b", "c"),
        ("PEXPIRE", keys.worker(worker), _BAD),
        ("DEL", keys.head(worker, _BAD, 0)),
        ("WATCH", keys.meta),
        ("UNWATCH",),
        ("MULTI",),
        ("DISCARD",),
    ]


def _denied(connection: Connection, commands: list[Command]) -> list[str]:
    """Those that this user may not send, as `COMMAND key`."""
    prefix = f"{connection.keys.prefix}:"
    denied = []
    for command in commands:
        if isinstance(_try(connection, command), NoPermissionError):
            keys = [
                str(word).replace(f"{_BAD}:0:head", "*") for word in command if str(word).startswith(prefix)
            ]
            denied.append(" ".join([str(command[0]), *keys]))
    # A user who may MULTI but not DISCARD, or WATCH but not UNWATCH, leaves a connection that is good for nothing.
    connection.client.connection_pool.disconnect()
    return denied


def _try(connection: Connection, command: Command) -> Any:
    """The reply, or the error that Redis replied."""
    with connection.errors():
        try:
            return connection.client.execute_command(*command)
        except ResponseError as error:
            return error


def _look(connection: Connection) -> tuple[Federation | None, list[str]]:
    """The federation as this user sees it, and what it may not see."""
    try:
        seen = Inspector(connection).federation()
    except RedisUnavailableError:
        return None, [f"HGETALL {connection.keys.experts}"]
    problems = [*seen.problems, *(p for e in seen.experts for p in e.problems), *seen.gateway.problems]
    return seen, [problem.partition(" cannot be read")[0] for problem in problems if DENIED in problem]
