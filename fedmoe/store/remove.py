"""Permanently removes a whole expert, or a whole federation, from Redis."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis

from fedmoe.errors import RedisUnavailableError, UnknownExpertError
from fedmoe.protocol.keys import ExpertKeys
from fedmoe.protocol.records import check_not_removed, grave
from fedmoe.store.connection import Connection, execute
from fedmoe.store.lifecycle import new_id
from fedmoe.store.parts import stray_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Remaining:
    """What exists of an expert: its version ("?" if unknown), its living workers, its lease holder."""

    version: str
    workers: tuple[str, ...]
    lease: str


def look_at_expert(connection: Connection, name: str) -> Remaining:
    """What `remove_expert` would remove.

    Raises:
        UnknownExpertError: if the expert does not exist; names the existing experts.
        RemovedExpertError: if it was removed already.
    """
    keys, experts = connection.keys.expert(name), connection.keys.experts
    of_list, connection = connection.at(experts), connection.at(keys.meta)
    client = connection.client
    with of_list.errors():
        listed = sorted(one.decode(errors="replace") for one in of_list.client.hkeys(experts))
    with connection.errors():
        meta, lease = client.hgetall(keys.meta), client.get(keys.lease)
        if name not in listed:
            check_not_removed(meta)
        workers = _workers(connection, name)
        if not meta and name not in listed and not client.exists(keys.weights, keys.spec, keys.decided):
            raise UnknownExpertError(
                f"there is no expert {name!r}; there are: {', '.join(listed) or 'none'}", about=name
            )
    version = meta.get(b"version", b"?").decode(errors="replace")
    return Remaining(version=version, workers=workers, lease=(lease or b"").decode(errors="replace"))


def remove_expert(connection: Connection, name: str, *, clock: Callable[[], float] = time.time) -> None:
    """Remove an expert, also from the list of experts; aggregators and workers may be running.

    A meta hash that says so remains. It has a new commit id, so no retained state can be committed or written back on
    top of it; aggregators and workers that read it stop serving or training the expert and report it.
    """
    keys, experts = connection.keys.expert(name), connection.keys.experts
    of_list, connection = connection.at(experts), connection.at(keys.meta)
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(clock()))
    with connection.errors(), connection.client.pipeline(transaction=True) as pipe:
        pipe.unlink(
            keys.meta, keys.spec, keys.weights, keys.tail, keys.server_state, keys.packed, keys.decided, keys.vectors,
            keys.updates, keys.log, keys.dead, keys.lost, keys.claims, keys.problem, keys.lease,
            *stray_parts(connection.client, keys),
        )  # fmt: skip
        pipe.hset(keys.meta, mapping=grave(name, new_id(), when))
        pipe.execute()
    # Last: an aggregator takes an expert that was removed off the list, if this is not reached.
    with of_list.errors():
        of_list.client.hdel(experts, name)
    sweep(connection, name)


def sweep(connection: Connection, name: str) -> tuple[str, ...]:
    """Remove keys that workers wrote after their expert's removal; returns the workers that still have a heartbeat."""
    keys = connection.keys.expert(name)
    connection = connection.at(keys.meta)
    client = connection.client
    with connection.errors():
        if client.hget(keys.meta, "removed") is None:
            return ()  # the expert was created again
        client.unlink(keys.updates, keys.tail)  # an earlier release does not know the tail
        for key in client.scan_iter(match=f"{keys.root}:payload:*", count=1000):
            client.unlink(key)
        _sweep_parts(client, keys)
        return _workers(connection, name)


def _sweep_parts(client: Any, keys: ExpertKeys) -> None:
    """Remove the parts that a commit made permanent before its expert's removal; if it is created meanwhile, none."""
    if not (left := list(stray_parts(client, keys))):
        return
    with client.pipeline(transaction=True) as pipe:
        pipe.watch(keys.meta)
        if pipe.hget(keys.meta, "removed") is not None:
            pipe.multi()
            pipe.unlink(*left)
            execute(pipe)


def _workers(connection: Connection, name: str) -> tuple[str, ...]:
    prefix = connection.keys.expert(name).worker("")
    found = connection.client.scan_iter(match=f"{prefix}*", count=1000)
    return tuple(sorted(key.decode(errors="replace").removeprefix(prefix) for key in found))


def remove_federation(connection: Connection) -> None:
    """Remove every key of the federation; if Redis cannot be reached, do nothing."""
    keys = connection.keys
    try:
        for master in connection.masters():
            for pattern in (keys.experts, keys.aggregators, keys.expert("*").root + ":*"):
                for key in master.client.scan_iter(match=pattern, count=1000):
                    master.client.unlink(key)
    except (RedisUnavailableError, redis.RedisError, OSError):
        return
