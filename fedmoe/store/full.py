"""What still has to work when Redis is full (`maxmemory` is reached, noeviction).

A full Redis refuses whatever could need memory, and inside MULTI it refuses everything, reads too. So the transaction
that would free memory, a commit that removes the payloads of what it decided, is refused as well: a deadlock. Out of
it lead a script that may exceed the limit (`allow-oom`, Redis 7), and reads that a WATCH makes consistent instead of
a MULTI.
"""

from collections.abc import Sequence
from typing import Any

import redis

from fedmoe.errors import RedisUnavailableError
from fedmoe.store.connection import execute

Command = Sequence[Any]

# KEYS[1] is a hash whose field `commit` must be ARGV[1], "" if there is none; then come commands, each led by the
# number of its words.
_TRANSACTION = """#!lua flags=allow-oom
if (redis.call('HGET', KEYS[1], 'commit') or '') ~= ARGV[1] then return 0 end
local at = 2
while at <= #ARGV do
  local words = tonumber(ARGV[at])
  redis.call(unpack(ARGV, at + 1, at + words))
  at = at + words + 1
end
return 1"""
_TRIES = 20


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
        wrong_type_is_none: the reply of a key of another type is None, instead of an error.

    Raises:
        RedisUnavailableError: if Redis is full and the keys change all the time.
        redis.RedisError: what redis-py raises.
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
    raise RedisUnavailableError("Redis is full, and what is read changes all the time: raise its maxmemory")


def _none_if_wrong_type(reply: Any) -> Any:
    if not isinstance(reply, Exception):
        return reply
    if "WRONGTYPE" not in str(reply):
        raise reply
    return None


def transact(pipe: Any, key: str, commit: str, commands: Sequence[Command]) -> bool:
    """Execute commands beyond the memory limit, all or none; False if `key`'s field `commit` is another.

    Args:
        pipe: a pipeline that is watching, so that the script goes over the connection that was checked.
        key: of a hash; all keys of the commands share its Cluster slot.
        commit: what its field `commit` must be.
        commands: as redis-py's pipeline holds them.
    """
    words = [word for command in commands for word in (len(command), *command)]
    return bool(pipe.eval(_TRANSACTION, 1, key, commit, *words))
