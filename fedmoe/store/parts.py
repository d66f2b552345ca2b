"""Weights and server state that are too long for one Redis string: written part by part, and read part by part.

A commit writes its parts before its transaction, because a server closes a connection that queues more than 1 GiB.
Until then they expire, so a process that dies leaves nothing behind. The transaction makes them permanent, switches
`meta` and the headers to them, and removes those of the commit before. It does the same with the copied parts of the
tail (`fedmoe.store.copies`).

A reader takes all other keys as of one moment, then the parts that this meta names. A part never changes, so either it
is that moment's, or it is gone; then the reader begins again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import redis

from fedmoe.errors import StaleStateError
from fedmoe.protocol.keys import ExpertKeys
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.weights_parts import WeightsParts, header_bytes, values_parts
from fedmoe.store.chunks import as_read, weights_reads
from fedmoe.store.full import is_full, read_together

NO_PARTS = WeightsParts()
PART_TTL_MS = 600_000  # of parts that no commit has made permanent
TRIES = 3  # at reading part by part, before all parts are read in one transaction
_SET = """#!lua flags=allow-oom
return redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])"""

File = bytes | memoryview


def weights_keys(keys: ExpertKeys, parts: WeightsParts) -> list[str]:
    """The keys of the parts of the weights."""
    return [keys.weights_part(parts.commit, index) for index in range(parts.count)]


def state_keys(keys: ExpertKeys, parts: WeightsParts) -> list[str]:
    """The keys of the parts of the server state; it need not exist."""
    return [keys.server_state_part(parts.commit, index) for index in range(parts.count)]


def read_whole(
    client: Any, keys: ExpertKeys, *reads: tuple[Any, ...], wrong_type_is_none: bool = False
) -> list[Any]:
    """Like `read_together`, with weights and server state as whole files, whether they lie in parts or not.

    One of the reads is ("hgetall", keys.meta). The reply to a "get" of `keys.weights` or `keys.server_state` is the
    file (a bytearray if it lies in parts), and the reply to a "strlen" of them its length. If a part is lost, the reply
    is the header alone, or a shorter length.

    At most one part is in memory beside the file; if commits remove the parts each time while they are read, all of
    them are read in one transaction.
    """
    at = reads.index(("hgetall", keys.meta))
    before = NO_PARTS
    for tries in count(1):
        expected = WeightsParts.in_meta(client.hgetall(keys.meta)) if tries > TRIES else NO_PARTS
        names = part_keys(keys, expected)
        replies = read_together(
            client, *reads, *(("get", name) for name in names), wrong_type_is_none=wrong_type_is_none
        )
        there = dict(zip(names, replies[len(reads) :], strict=True))
        del replies[len(reads) :]
        parts = WeightsParts.in_meta(replies[at])
        if expected and parts != expected:
            continue
        if not parts or _complete(client, keys, parts, reads, replies, there) or parts == before:
            break
        before = parts
    return replies


def read_chunks(client: Any, keys: ExpertKeys, layout: Layout, *reads: tuple[Any, ...]) -> list[Any]:
    """Like `read_together`, with the replies to `weights_reads` at the end, whether the weights lie in parts or not.

    One of the reads is ("hgetall", keys.meta).
    """
    replies = read_together(client, *reads, *weights_reads(keys.weights, layout))
    if not WeightsParts.in_meta(replies[reads.index(("hgetall", keys.meta))]):
        return replies
    *replies, file = read_whole(client, keys, *reads, ("get", keys.weights))
    return replies + as_read(layout, file)


def _complete(
    client: Any,
    keys: ExpertKeys,
    parts: WeightsParts,
    reads: tuple[tuple[Any, ...], ...],
    replies: list[Any],
    there: Mapping[str, bytes | None],
) -> bool:
    """Put whole files, and their lengths, in the place of headers; False if a part is missing."""
    names = {keys.weights: weights_keys(keys, parts), keys.server_state: state_keys(keys, parts)}
    is_whole = True
    for number, (method, key, *_) in enumerate(reads):
        if key not in names or method not in ("get", "strlen") or not replies[number]:
            continue
        if method == "strlen":
            replies[number] += sum(_ask(client.strlen, name) or 0 for name in names[key])
            is_whole &= replies[number] == parts.n_bytes
            continue
        whole = bytearray(replies[number])
        for name in names[key]:
            if (part := there.get(name) or _ask(client.get, name)) is None:
                is_whole = False
                break
            whole += part
        else:
            replies[number] = whole
    return is_whole


def _ask(command: Callable[[str], Any], name: str) -> Any:
    """The reply to a command on a part; None if the key is of the wrong type."""
    try:
        return command(name)
    except redis.ResponseError as error:
        if "WRONGTYPE" not in str(error):
            raise
    return None


class NewWeights:
    """The strings of weights and server state that a commit writes; their parts are written at once, if there are some.

    As a context it removes the parts if the commit fails with StaleStateError. After another error the commit may still
    be executed, so they are left to expire.

    Args:
        client: a redis client.
        keys: of the expert.
        parts: as the commit's meta names them.
        weights, server_state: the files; None for what the commit does not write.
        copies: keys of the copied parts that the commit adds to the tail; they are there already, and expire.
        though_full: write the parts beyond the limit of a full Redis, as the commit does itself.

    Attributes:
        strings: what the transaction writes: key -> file, or its header if the values lie in parts.
        parts: keys that the transaction makes permanent. It watches them, so that it fails if one expires.
        replaced: keys of the parts that it removes.
    """

    def __init__(
        self,
        client: Any,
        keys: ExpertKeys,
        parts: WeightsParts,
        weights: File | None,
        server_state: File | None,
        *,
        copies: Sequence[str] = (),
        though_full: bool = False,
    ) -> None:
        self._client = client
        files = {keys.weights: weights, keys.server_state: server_state}
        self.strings: dict[str, File | None] = dict(files)
        self.parts = list(copies)
        self.replaced: list[str | bytes] = []
        if not parts or weights is None:
            return
        for key, names in ((keys.weights, weights_keys), (keys.server_state, state_keys)):
            if (file := files[key]) is None:
                continue
            for name, values in zip(names(keys, parts), values_parts(file), strict=True):
                self._write(name, values, though_full)
                self.parts.append(name)
            self.strings[key] = header_bytes(file)

    def _write(self, name: str, values: memoryview, though_full: bool) -> None:
        try:
            self._client.set(name, values, px=PART_TTL_MS)
        except redis.RedisError as error:
            if not is_full(error):
                raise
            if not though_full:
                self._remove()
                raise
            self._client.eval(_SET, 1, name, values, PART_TTL_MS)

    def _remove(self) -> None:
        if self.parts:
            self._client.unlink(*self.parts)

    def __enter__(self) -> "NewWeights":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is StaleStateError:
            self._remove()

    @property
    def watched(self) -> list[str]:
        """The keys to WATCH, so that the transaction fails if one of them expires before it."""
        return self.parts

    def check(self, pipe: Any, expert: str) -> None:
        """Raise StaleStateError if one of the parts, which `pipe` watches by now, has expired."""
        if self.parts and pipe.exists(*self.parts) != len(self.parts):
            raise StaleStateError(
                f"{expert}: what this commit had written or copied expired before it", about="parts"
            )

    def queue(self, pipe: Any) -> None:
        """Queue the commands that switch from the parts of the commit before to these; none if neither has parts."""
        for name in self.parts:
            pipe.persist(name)
        for replaced in self.replaced:
            pipe.unlink(replaced)


def part_keys(keys: ExpertKeys, parts: WeightsParts) -> list[str]:
    """The keys of all parts of a snapshot, which the commit after it removes."""
    return [*weights_keys(keys, parts), *state_keys(keys, parts)]


def stray_parts(client: Any, keys: ExpertKeys, but: WeightsParts = NO_PARTS) -> Iterator[bytes]:
    """All parts in Redis but these, and all copies: of an earlier snapshot and its tail, or of no commit at all."""
    kept = {name.encode() for name in part_keys(keys, but)}
    beginnings = tuple(f"{key}:".encode() for key in (keys.weights, keys.server_state, keys.tail))
    for key in client.scan_iter(match=keys.parts, count=1000):
        if key.startswith(beginnings) and key not in kept:
            yield key
