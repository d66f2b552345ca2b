"""Checks whether a Redis is fit for FedMoE, and what this user may do there. It changes nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

from fedmoe.errors import RedisUnavailableError
from fedmoe.protocol.eviction import eviction_threat
from fedmoe.protocol.federation import MEMORY_ALARM, ExpertView
from fedmoe.protocol.rules import TRAIN_GATEWAY
from fedmoe.store.access import access_checks
from fedmoe.store.connection import Connection
from fedmoe.store.inspect import Inspector
from fedmoe.store.permissions import AGGREGATOR, ROLES, WORKER, Role, worker_rights
from fedmoe.store.rights import Lack, lacking, try_transactions
from fedmoe.util.check import FAIL, OK, WARN, Check

OLDEST = (7, 0)
EXAMPLE_EXPERT = "python_expert"

Command = tuple[str | int, ...]


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
    if info.get("cluster_enabled"):
        checks.append(
            Check(FAIL, "redis", "this is a node of a Redis Cluster: use a server without cluster mode")
        )
    return [*checks, _memory(info, url), *_durability(info)]


def eviction_warning(connection: Connection) -> str:
    """A sentence if this server may evict keys, "" if it may not, or its policy is unknown.

    Raises:
        RedisUnavailableError: if Redis cannot be reached.
    """
    info = _try(connection, ("INFO", "memory"))
    policy = "" if isinstance(info, Exception) else info.get("maxmemory_policy", "")
    if not policy:
        settings = _try(connection, ("CONFIG GET", "maxmemory-policy"))
        policy = "" if isinstance(settings, Exception) else settings.get("maxmemory-policy", "")
    threat = eviction_threat(str(policy), connection.settings.shown)
    return f"Redis at {connection.settings.shown} {threat}" if threat else ""


def _memory(info: Mapping[str, Any], url: str) -> Check:
    bound = info.get("maxmemory", 0)
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


def check_redis(connection: Connection, *, stream: str, worker: str, role: str) -> tuple[list[Check], str]:
    """All checks of the server and this user, and the name of the experts' base model ("" if there is none yet).

    Args:
        connection: to the Redis.
        stream: a worker's expert, "" for the first one found.
        worker: a worker's name.
        role: name of the role that this user must have the rights for, or "".

    Raises:
        RedisUnavailableError: if Redis cannot be reached.
    """
    info = _try(connection, ("INFO",))
    if isinstance(info, Exception):
        why = (
            "this user may not run INFO"
            if isinstance(info, NoPermissionError)
            else "the server does not answer INFO"
        )
        checks = [Check(WARN, "redis", f"answers; version and memory are not checked: {why}")]
    else:
        checks = server_checks(info, connection.settings.shown)
    experts = _look(connection)
    stream = stream or (experts[0].name if experts else EXAMPLE_EXPERT)
    trains_gateway = any(
        expert.name == stream and expert.meta and TRAIN_GATEWAY in expert.meta.rules.trained
        for expert in experts
    )
    rights = {each.name: each.rights(connection.keys, stream, worker) for each in ROLES.values()}
    rights[WORKER.name] = worker_rights(connection.keys, stream, worker, trains_gateway=trains_gateway)
    lacks = {name: lacking(connection, some) for name, some in rights.items()}
    trained = f"{stream} and the gateway" if trains_gateway else stream
    does = {each.name: each.does for each in ROLES.values()} | {WORKER.name: f"train {trained} as {worker}"}
    checks += permission_checks({name: (does[name], lacks[name]) for name in ROLES}, required=role)
    for each in (AGGREGATOR, WORKER):
        if role in ("", each.name) and not any(not lack.right.without for lack in lacks[each.name]):
            checks.append(_transactions(connection, each, stream, worker))
            break
    checks += access_checks(connection)
    base_models = [expert.meta.base_model for expert in experts if expert.meta]
    return checks, base_models[0] if base_models else ""


def permission_checks(roles: Mapping[str, tuple[str, Sequence[Lack]]], *, required: str) -> list[Check]:
    """One check for each role {name: (task, lacking rights)}; the `required` role fails if it lacks any. Pure."""
    checks = []
    needed = {name: [lack for lack in lacks if not lack.right.without] for name, (_, lacks) in roles.items()}
    useless = all(needed.values())
    for name, (does, lacks) in roles.items():
        text = list(dict.fromkeys(map(str, needed[name])))
        if not text:
            checks.append(_may(does, lacks))
        elif name == required:
            checks.append(
                Check(
                    FAIL,
                    "permissions",
                    f"this user may not {does}: it lacks {', '.join(text)}; "
                    f"`fedmoe doctor --acl {name}` prints all rights that it needs",
                )
            )
        elif not required:
            some = ", ".join(text[:3]) + (
                f" and {len(text) - 3} more (see --role {name})" if len(text) > 3 else ""
            )
            checks.append(
                Check(FAIL if useless else WARN, "permissions", f"this user may not {does}: it lacks {some}")
            )
    return checks


def _may(does: str, lacks: Sequence[Lack]) -> Check:
    less = "; ".join(dict.fromkeys(f"without {lack}, {lack.right.without}" for lack in lacks))
    return Check(WARN if less else OK, "permissions", f"this user may {does}{f' ({less})' if less else ''}")


def _transactions(connection: Connection, role: Role, expert: str, worker: str) -> Check:
    try:
        wrong = try_transactions(connection, role, expert, worker)
    except RedisUnavailableError as error:
        return Check(FAIL, "transactions", f"could not be tried: {error}")
    if wrong:
        return Check(
            FAIL, "transactions", f"{wrong}: use another server, without a proxy that shares connections"
        )
    return Check(OK, "transactions", "work between two connections")


def _try(connection: Connection, command: Command) -> Any:
    """The reply, or Redis's error reply."""
    with connection.errors():
        try:
            return connection.client.execute_command(*command)
        except ResponseError as error:
            return error


def _look(connection: Connection) -> tuple[ExpertView, ...]:
    """The experts as this user sees them; none if this user may not list them."""
    try:
        return Inspector(connection).federation().experts
    except RedisUnavailableError:
        return ()
