"""Large weights, written in place and read in chunks of 1 MiB, inside one MULTI.

Redis's allocator, jemalloc, returns every block above 8 MiB to the system at once (its `oversize_threshold`). So each
SET of larger weights, and each reply to a GET of them, needs fresh pages, which cost more than copying the bytes.
Chunks stay below that limit, and SETRANGE overwrites the old value in place. `ops/bench.sh --only machine` measures
the difference. (Values that are read rarely, such as those an aggregator loads, are read whole. Packed weights have
parts of their own, see fedmoe/protocol/packed.py.)

A SET that is too long for the server fails before the MULTI executes; a SETRANGE that ends beyond `proto-max-bulk-len`
fails in the middle of the MULTI. Hence `places` tries a SETRANGE on the last byte first.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedmoe.protocol.layout import Layout, check_file, stamp_of

CHUNK_BYTES = 1024 * 1024
# Shorter values are written whole; the limit is far enough below 8 MiB for any allocator's rounding.
IN_PLACE_BYTES = 4 * 1024 * 1024

# The lengths of strings that never expire and whose last byte can be written; 0 for other values.
_PLACE = """#!lua flags=allow-oom
local lengths = {}
for i, key in ipairs(KEYS) do
  lengths[i] = 0
  if redis.call('TYPE', key).ok == 'string' and redis.call('PTTL', key) == -1 then
    local length = redis.call('STRLEN', key)
    local last = redis.call('GETRANGE', key, length - 1, length - 1)
    local done = length > 0 and redis.pcall('SETRANGE', key, length - 1, last)
    if type(done) == 'number' then lengths[i] = length end
  end
end
return lengths"""


def places(client: Any, values: Mapping[str, memoryview | bytes | None]) -> dict[str, int]:
    """Keys whose present value these large values can overwrite in place, with its length in bytes (0: it cannot).

    The last byte of each present value is rewritten, so call this before the WATCH.
    """
    large = [key for key, value in values.items() if value is not None and len(value) >= IN_PLACE_BYTES]
    return dict(zip(large, client.eval(_PLACE, len(large), *large), strict=True)) if large else {}


def put(pipe: Any, key: str, value: memoryview | bytes, present: int) -> None:
    """Queue the commands that write a value: in place if the watched present value has the same length, else a SET."""
    if len(value) != present:
        pipe.set(key, value)
        return
    view = memoryview(value)
    for first in range(0, present, CHUNK_BYTES):
        pipe.setrange(key, first, view[first : first + CHUNK_BYTES])


def weights_reads(key: str, layout: Layout) -> Iterator[tuple[Any, ...]]:
    """The reads of an adapter's safetensors file, for `read_together`."""
    begin = len(layout.header)
    yield "strlen", key
    yield "getrange", key, 0, begin - 1
    for first in range(begin, layout.file_bytes, CHUNK_BYTES):
        yield "getrange", key, first, min(first + CHUNK_BYTES, layout.file_bytes) - 1


def as_read(layout: Layout, file: bytes | memoryview | None) -> list[Any]:
    """A whole file (None: the key is missing) as the replies to `weights_reads`, in one chunk that is not copied."""
    view, begin = memoryview(file or b""), len(layout.header)
    return [len(view), bytes(view[:begin]), view[begin:]]


def values_and_stamp(
    layout: Layout, replies: Sequence[Any]
) -> tuple[Sequence[bytes | memoryview], str] | None:
    """Values (in chunks) and stamp of the file, from the replies to `weights_reads`; None if the key is missing.

    Raises:
        SpecError: if the file does not have that layout.
    """
    length, header, *values = replies
    if not length:
        return None
    check_file(layout, length, header)
    return values, stamp_of(header)
