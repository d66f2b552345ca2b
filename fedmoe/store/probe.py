"""Checks whether a Redis is fit for FedMoE, and what this user may do there. It changes nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from redis.exceptions import ResponseError

from fedmoe.errors import RedisUnavailableError
from fedmoe.protocol.eviction import eviction_threat
from fedmoe.protocol.federation import ExpertView
from fedmoe.protocol.rules import TRAIN_GATEWAY
from fedmoe.store.access import access_checks, node_rights_checks
from fedmoe.store.cluster_checks import cluster_checks
from fedmoe.store.connection import Connection
from fedmoe.store.inspect import Inspector
from fedmoe.store.permissions import AGGREGATOR, ROLES, WORKER, Role, worker_rights
from fedmoe.store.rights import Lack, lacking, try_transactions
from fedmoe.store.server_info import info_checks
from fedmoe.util.check import FAIL, OK, WARN, Check

EXAMPLE_EXPERT = "python_expert"

Command = tuple[str | int, ...]


def eviction_warning(connection: Connection) -> str:
    """A sentence if this server, or a master of this cluster, may evict keys, else "" (also if that is unknown).

    Raises:
        RedisUnavailableError: if Redis cannot be reached.
    """
    for master in connection.masters():
        info = _try(master, ("INFO", "memory"))
        policy = "" if isinstance(info, Exception) else info.get("maxmemory_policy", "")
        if not policy:
            settings = _try(master, ("CONFIG GET", "maxmemory-policy"))
            policy = "" if isinstance(settings, Exception) else settings.get("maxmemory-policy", "")
        if threat := eviction_threat(str(policy), connection.settings.shown):
            return f"Redis at {connection.settings.shown} {threat}"
    return ""


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
    checks = cluster_checks(connection) if connection.cluster else info_checks(connection)
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
    able = {name: rights[name] for name in ROLES if not any(not lack.right.without for lack in lacks[name])}
    checks += node_rights_checks(connection, {role: able[role]} if role in able else able)
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
    by_what_follows: dict[str, list[str]] = {}
    for lack in lacks:
        by_what_follows.setdefault(lack.right.without, []).append(str(lack))
    less = "; ".join(
        f"without {', '.join(dict.fromkeys(rights))}, {what}" for what, rights in by_what_follows.items()
    )
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
