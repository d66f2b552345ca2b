"""The copied parts of the tail's updates: made within Redis, and read one update after the other.

A copy is made before its update is folded, and expires; the commit makes it permanent (`fedmoe.store.parts`). So a
process that dies leaves nothing behind.

A reader takes all other keys as of one moment, then the copies that the records of that moment name. A copy never
changes, so either it is that moment's, or it is gone, because somebody wrote the weights; then the reader begins again.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from types import MappingProxyType
from typing import Any

from fedmoe.protocol.keys import ExpertKeys
from fedmoe.protocol.tail import Copy, copied_keys
from fedmoe.store.full import is_full
from fedmoe.store.parts import PART_TTL_MS, TRIES, read_whole
from fedmoe.store.refusals import is_refusal

AT_ONCE = 8  # parts of at most 1 MiB that a reader has in memory
_MOST_KEYS = 1000  # in one command
# KEYS: a part of a payload, and its copy, which does not exist yet. A worker may write anything under its key, so only
# a string of the announced length is copied.
COPY = """#!lua
if redis.call('STRLEN', KEYS[1]) ~= tonumber(ARGV[1]) then return 0 end
local done = redis.call('COPY', KEYS[1], KEYS[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return done"""

Command = tuple[str | int, ...]


def copy_commands(source: str, name: str, length: int) -> tuple[Command, Command]:
    """The commands that copy a part of so many bytes, and read the copy."""
    return ("EVAL", COPY, 2, source, name, length, PART_TTL_MS), ("GETRANGE", name, 0, length)


def is_copied(reply: Any, copy: Copy) -> bool:
    """True if this reply to the first of `copy_commands` says that the part was copied.

    Notes in `copy` if Redis refuses it, because it is full or this user may not copy. Raises any other error.
    """
    if not isinstance(reply, Exception):
        return bool(reply)
    if is_full(reply) or is_refusal(reply):
        copy.refused = reply
    elif "WRONGTYPE" not in str(reply):
        raise reply
    return False


class Copies:
    """Reads copied parts, a few at a time.

    Args:
        client: a redis client.
        keys: of the expert.
        there: those that were read already, by key.

    Attributes:
        is_one_gone: a part was not there.
    """

    def __init__(
        self, client: Any, keys: ExpertKeys, there: Mapping[str, bytes | None] = MappingProxyType({})
    ) -> None:
        self._client, self._keys, self._there = client, keys, there
        self.is_one_gone = False

    def __call__(self, token: str, n_parts: int) -> Iterator[bytes | None]:
        """The parts of one copy in order, None for one that is gone."""
        names = [self._keys.tail_part(token, index) for index in range(n_parts)]
        for first in range(0, n_parts, AT_ONCE):
            some = names[first : first + AT_ONCE]
            known = [self._there.get(name) for name in some]
            for part in known if None not in known else self._client.mget(some):
                self.is_one_gone |= part is None
                yield part

    def n_stored(self, tail: Mapping[bytes, bytes] | None) -> int:
        """How many records and parts of a tail are there; `tail` is the hash as it was read."""
        names = copied_keys(self._keys, tail)
        unknown = [name for name in names if self._there.get(name) is None]
        n_gone = len(unknown) - n_existing(self._client, unknown)
        self.is_one_gone |= n_gone > 0
        return len(tail or ()) + len(names) - n_gone


def readings(
    client: Any, keys: ExpertKeys, *reads: tuple[Any, ...], wrong_type_is_none: bool = False
) -> Iterator[tuple[list[Any], Copies]]:
    """Attempts to read an expert: the replies that `read_whole` gives, and a reader of copies. The last one counts.

    Among the reads are ("hgetall", keys.meta) and ("hgetall", keys.tail). The caller folds what it gets. If a copy was
    gone, there is another attempt, until meta names the same tail as the time before: then the copy is lost, and the
    expert is damaged. If commits remove the copies each time while they are read, all of them are read in the
    transaction, too.
    """
    of_meta, before = reads.index(("hgetall", keys.meta)), None
    for tries in count(1):
        names = copied_keys(keys, client.hgetall(keys.tail)) if tries > TRIES else []
        gets = (("mget", name) for name in names)
        replies = read_whole(client, keys, *reads, *gets, wrong_type_is_none=wrong_type_is_none)
        there = {name: found[0] for name, found in zip(names, replies[len(reads) :], strict=True)}
        copies = Copies(client, keys, there)
        yield replies[: len(reads)], copies
        tail = (replies[of_meta] or {}).get(b"tail")
        if not copies.is_one_gone or tail == before:
            return
        before = tail


def n_existing(client: Any, names: Sequence[str]) -> int:
    """How many of these keys exist."""
    some = [names[first : first + _MOST_KEYS] for first in range(0, len(names), _MOST_KEYS)]
    return sum(client.exists(*each) for each in some)
