"""Tests which rights this user has, and whether transactions are isolated.

Commands are queued in a MULTI without an EXEC: Redis checks rights when it queues, so nothing is executed. Only
transactions and scripts are executed, on a temporary key.
"""

import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import redis

from fedmoe.errors import RedisUnfitError
from fedmoe.protocol.keys import GROUP
from fedmoe.store.client import Words
from fedmoe.store.connection import Connection, execute
from fedmoe.store.full import transact
from fedmoe.store.lease import Lease
from fedmoe.store.permissions import AGGREGATOR, Right, Role
from fedmoe.store.refusals import is_not_allowed, is_refusal

TRIAL_MS = 10_000
_KEY = "{key}"
_NO_NAME = "no-such-thing"  # replaces the wildcard of a pattern
# Minimal arguments of each command; a command that is not listed takes only its key.
_WORDS: dict[str, Words] = {
    "ACL DELUSER": (_NO_NAME,),
    "ACL SETUSER": (_NO_NAME,),
    "COPY": (_KEY, _KEY),
    "EVAL": ("return 1", 1, _KEY),
    "EVALSHA": ("0" * 40, 1, _KEY),
    "GETRANGE": (_KEY, 0, 0),
    "HDEL": (_KEY, "f"),
    "HGET": (_KEY, "f"),
    "HMGET": (_KEY, "f"),
    "HSET": (_KEY, "f", "v"),
    "HSETNX": (_KEY, "f", "v"),
    "INCRBY": (_KEY, 1),
    "PEXPIRE": (_KEY, 1),
    "SCAN": (0, "COUNT", 1),
    "SCRIPT LOAD": ("return 1",),
    "SET": (_KEY, "v"),
    "SETRANGE": (_KEY, 0, "v"),
    "XACK": (_KEY, GROUP, "0-1"),
    "XADD": (_KEY, "*", "f", "v"),
    "XAUTOCLAIM": (_KEY, GROUP, "doctor", 0, "0-0"),
    "XDEL": (_KEY, "0-1"),
    "XGROUP CREATE": (_KEY, GROUP, "0"),
    "XRANGE": (_KEY, "-", "+", "COUNT", 1),
    "XREADGROUP": ("GROUP", GROUP, "doctor", "COUNT", 1, "STREAMS", _KEY, ">"),
    "XREVRANGE": (_KEY, "+", "-", "COUNT", 1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """A right that this user lacks, on one key; `no_command` if the server does not have the command."""

    right: Right
    no_command: bool = False

    def __str__(self) -> str:
        name = self.right.command
        return (
            f"{name} (this server does not know it)"
            if self.no_command
            else " ".join([name, *self.right.keys])
        )


def lacking(connection: Connection, rights: Sequence[Right]) -> list[Lack]:
    """The rights of these that this user lacks; only MULTI if MULTI is lacking, as nothing else can then be tried.

    Raises:
        RedisUnavailableError: if Redis cannot be reached.
    """
    each = [replace(right, keys=(key,) if key else ()) for right in rights for key in right.keys or ("",)]
    places: dict[Connection, list[Right]] = {}
    for right in each:
        places.setdefault(connection.at(_key(right)) if right.keys else connection, []).append(right)
    needs_multi = any(right.command == "MULTI" for right in each)
    lacks = [
        lack for there, some in places.items() for lack in _lacking(there, some, needs_multi=needs_multi)
    ]
    without_multi = [lack for lack in lacks if lack.right.command == "MULTI"]
    return without_multi[:1] or lacks


def _lacking(connection: Connection, each: Sequence[Right], *, needs_multi: bool) -> list[Lack]:
    """The same for rights on keys of one slot; with `needs_multi` nothing is tried outside a MULTI."""
    watches = [right for right in each if right.command == "WATCH"]  # it cannot be queued
    others = [right for right in each if right.command not in ("WATCH", "MULTI", "EXEC")]
    with connection.errors():
        begun, ended = _replies(connection, [("MULTI",), ("EXEC",)])
        if not is_refusal(begun):
            replies = _replies(connection, [*map(words, watches), ("MULTI",), *map(words, others)])
            del replies[len(watches)]
        elif needs_multi:
            return [_lack(Right(command="MULTI"), begun)]
        else:  # a role that writes nothing
            replies = _replies(connection, [words(right) for right in watches + others])
    tried = {"MULTI": begun, "EXEC": ended}
    found = [(right, tried[right.command]) for right in each if right.command in tried]
    asked = zip(watches + others, replies, strict=True)
    return [_lack(right, reply) for right, reply in [*asked, *found] if is_refusal(reply)]


def _lack(right: Right, reply: object) -> Lack:
    return Lack(right=right, no_command=not is_not_allowed(reply))


def _replies(connection: Connection, commands: Sequence[Words]) -> list[object]:
    """The replies; the connection is closed afterwards, so that an open MULTI is discarded."""
    try:
        return list(connection.stream(commands, ahead=len(commands)))
    finally:
        connection.client.connection_pool.disconnect(inuse_connections=False)


def check_writes(connection: Connection, commands: Sequence[Words]) -> None:
    """Have Redis check commands that will write, without executing them.

    Raises:
        RedisUnavailableError, RedisUnfitError: if it would refuse one: for a lacking right, or because it is a replica.
    """
    with connection.errors():
        for tried in ([("MULTI",)], [("MULTI",), *commands]):  # without MULTI, they would be executed
            for reply in _replies(connection, tried):
                if isinstance(reply, redis.ResponseError):
                    raise reply


def words(right: Right) -> Words:
    """The command of a right with one key or none; a key pattern becomes the name of a key that does not exist."""
    key = _key(right) if right.keys else ""
    around = _WORDS.get(right.command, (_KEY,) if key else ())
    return [*right.command.split(), *(key if word == _KEY else word for word in around)]


def _key(right: Right) -> str:
    return right.keys[0].replace("*", _NO_NAME)


def require(connection: Connection, role: Role, experts: Sequence[str], worker: str = "") -> None:
    """Raise RedisUnfitError, with all lacking rights, unless this user has a `role`'s rights for these experts."""
    rights = [right for expert in experts for right in role.rights(connection.keys, expert, worker)]
    lacks = [lack for lack in lacking(connection, rights) if not lack.right.without]
    if not lacks:
        return
    if gone := [lack for lack in lacks if lack.no_command]:
        names = ", ".join(dict.fromkeys(lack.right.command for lack in gone))
        raise RedisUnfitError(
            f"Redis at {connection.settings.shown} has no {names}, and FedMoE needs that to {role.does}: take it out "
            "of rename-command there, or use another server (Redis 7.0, Valkey 8, or newer)",
            about="command",
        )
    enrolled = connection.settings.enrolled
    if enrolled and enrolled.role and enrolled.role != role.name:
        raise RedisUnfitError(
            f"the enrolment file {str(enrolled.path)!r} is that of a {enrolled.role}, who may not {role.does}: name "
            f"one of the role {role.name}",
            about="rights",
        )
    text = ", ".join(dict.fromkeys(map(str, lacks)))
    raise RedisUnfitError(
        f"this user of Redis at {connection.settings.shown} may not {role.does}, it lacks {text}: give it the rights "
        f"that `fedmoe doctor --acl {role.name}` prints",
        about="rights",
    )


def try_transactions(connection: Connection, role: Role, expert: str, worker: str) -> str:
    """Run a compare-and-swap between two connections; returns what is wrong with transactions, "" if nothing is.

    It also runs scripts, if the role uses them. A proxy or a Redis-like server may accept all commands without
    isolating transactions, and every commit relies on that.

    Raises:
        RedisUnavailableError: if one of the commands is refused.
    """
    key = connection.keys.expert(expert).trial(worker, secrets.token_hex(8))
    connection, other = connection.at(key), Connection(connection.settings).at(key)
    try:
        with connection.errors(), other.errors():
            wrong = _try_watch(connection.client, other.client, key)
            if not wrong and role is AGGREGATOR:
                wrong = _try_scripts(connection, other, key)
            return wrong
    finally:
        with suppress(redis.RedisError, OSError):
            connection.client.delete(key)  # if this fails, the key expires
        other.close()


def _try_watch(one: Any, two: Any, key: str) -> str:
    with one.pipeline(transaction=True) as pipe:
        for disturbed in (True, False):
            two.set(key, "before", px=TRIAL_MS)
            pipe.watch(key)
            if disturbed:
                two.set(key, "meanwhile", px=TRIAL_MS)
            pipe.multi()
            pipe.set(key, "after", px=TRIAL_MS)
            done = execute(pipe) is not None
            if done is disturbed:
                return (
                    "a transaction was executed though the key that it watched had changed"
                    if disturbed
                    else "a transaction was not executed though nobody had changed the key that it watched"
                )
    return ""


def _try_scripts(one: Connection, two: Connection, key: str) -> str:
    leases = [Lease(c, key, holder=name, ttl_ms=TRIAL_MS) for c, name in ((one, "one"), (two, "two"))]
    one.client.delete(key)
    if [lease.hold() for lease in leases] != [True, False]:
        return "two connections could take one lease"
    leases[0].release()
    one.client.hset(key, "commit", "a")
    one.client.pexpire(key, TRIAL_MS)
    swaps = []
    for connection, new in ((one, "b"), (two, "c")):
        with connection.client.pipeline(transaction=True) as pipe:
            pipe.watch(key)
            swaps.append(transact(pipe, key, "a", [("HSET", key, "commit", new)]))
    return "" if swaps == [True, False] else "two connections could commit on top of one commit"
