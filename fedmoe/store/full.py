"""Reads and transactions that still work when Redis is full (`maxmemory` is reached, noeviction).

A full Redis refuses every command that could need memory, and inside MULTI it refuses every command, even reads. So it
also refuses the transaction that would free memory, a commit that removes decided payloads: a deadlock. Two means
avoid it: a script that may exceed the limit (`allow-oom`, Redis 7), and reads made consistent by a WATCH instead of a
MULTI.
"""

from collections.abc import Sequence
from typing import Any

import redis

from fedmoe.errors import RedisUnavailableError
from fedmoe.protocol.keys import absent
from fedmoe.store.connection import execute

Command = Sequence[Any]

# KEYS[1] is a hash whose field `commit` must equal ARGV[1] ("" if it is missing). KEYS[2] never exists (`absent`); the
# first ARGV[2] of those after it must exist. The other arguments are commands, each preceded by the number of its
# words.
_TRANSACTION = """#!lua flags=allow-oom
if (redis.call('HGET', KEYS[1], 'commit') or '') ~= ARGV[1] then return 0 end
for i = 3, 2 + ARGV[2] do if redis.call('EXISTS', KEYS[i]) == 0 then return 0 end end
local at = 3
while at <= #ARGV do
  local words = tonumber(ARGV[at])
  redis.call(unpack(ARGV, at + 1, at + words))
  at = at + words + 1
end
return 1"""
_TRIES = 20
NEARLY_FULL = 0.9  # of maxmemory


def memory_share(client: Any, more: int = 0) -> float:
    """The share of maxmemory that is in use, with so many bytes more; 0 if there is no limit, or nobody may ask."""
    try:
        memory = client.info("memory")
    except redis.ResponseError:  # this user may not run INFO, or a managed server renamed it
        return 0.0  # then only a refused write shows that Redis is full
    bound = memory.get("maxmemory", 0)
    return (memory.get("used_memory", 0) + more) / bound if bound else 0.0


def is_full(error: Exception) -> bool:
    """True if Redis refused a command, or a transaction, because it is full."""
    return isinstance(error, redis.exceptions.OutOfMemoryError) or (
        isinstance(error, redis.exceptions.ExecAbortError) and "OOM" in str(error)
    )


def read_together(client: Any, *reads: tuple[Any, ...], wrong_type_is_none: bool = False) -> list[Any]:
    """The replies to several reads as of one moment.

    Args:
        client: a redis client.
        reads: (method, key, further arguments), for example ("hget", key, field).
        wrong_type_is_none: None is the reply for a key of the wrong type, instead of an error.

    Raises:
        RedisUnavailableError: if Redis is full and the keys keep changing.
        redis.RedisError: any other error of redis-py.
    """

    def ask(pipe: Any) -> list[Any]:
        return [getattr(pipe, method)(*words) for method, *words in reads]

    with client.pipeline(transaction=True) as pipe:
        try:
            ask(pipe)
            replies = list(pipe.execute(raise_on_error=not wrong_type_is_none))
            return [_none_if_wrong_type(reply) for reply in replies]
        except redis.RedisError as error:
            if not is_full(error):
                raise
        for _ in range(_TRIES):
            pipe.watch(*dict.fromkeys(key for _, key, *_ in reads))
            replies = ask(pipe)
            pipe.multi()
            if execute(pipe) is not None:
                return replies
    raise RedisUnavailableError(
        "Redis is full, and the keys to read keep changing: raise its maxmemory", about="maxmemory"
    )


def _none_if_wrong_type(reply: Any) -> Any:
    if not isinstance(reply, Exception):
        return reply
    if "WRONGTYPE" not in str(reply):
        raise reply
    return None


def transact(
    pipe: Any,
    key: str,
    commit: str,
    commands: Sequence[Command],
    *,
    needed: Sequence[str] = (),
    removed: Sequence[str | bytes] = (),
) -> bool:
    """Execute commands atomically beyond the memory limit.

    Returns:
        False if `key`'s field `commit` is not `commit`, or a needed key does not exist; then nothing was executed.

    Args:
        pipe: a pipeline that is watching, so that the script uses the checked connection.
        key: of a hash; all keys of the commands share its Cluster slot.
        commit: the expected value of its field `commit`.
        commands: as redis-py's pipeline holds them.
        needed: keys that must exist; a script does not go by WATCH.
        removed: keys that the commands remove, and to which this user may lack the right; Redis looks at the keys that
            it is told before it begins with a script.
    """
    words = [word for command in commands for word in (len(command), *command)]
    keys = (key, absent(key), *needed, *removed)
    return bool(pipe.eval(_TRANSACTION, len(keys), *keys, commit, len(needed), *words))
