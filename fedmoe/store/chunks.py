"""Large weights, written in place and read in chunks of 1 MiB, inside one MULTI.

Redis's allocator, jemalloc, gives every block above 8 MiB back to the system at once (its `oversize_threshold`). So
each SET of larger weights, and each answer to a GET of them, goes to fresh pages, and that costs more than its bytes.
Chunks are smaller than that, and SETRANGE writes them over the old value in place. `ops/bench.sh --only machine`
measures the difference. (What is read seldom is read whole: all that an aggregator loads. Packed weights have parts
of their own, see fedmoe/protocol/packed.py.)

A SET that is too long for the server fails before its MULTI does; a SETRANGE that ends beyond `proto-max-bulk-len`
fails in the middle of it. Hence `places`, which tries that on the last byte.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedmoe.protocol.layout import Layout, check_file, stamp_of

CHUNK_BYTES = 1024 * 1024
# Shorter values are written whole; far enough from 8 MiB for any allocator's rounding.
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
    """Over which keys' values, of how many bytes, these large ones can be written in place.

    The values are written to (a byte over itself), so nobody may be watching them yet.
    """
    large = [key for key, value in values.items() if value is not None and len(value) >= IN_PLACE_BYTES]
    return dict(zip(large, client.eval(_PLACE, len(large), *large), strict=True)) if large else {}


def put(pipe: Any, key: str, value: memoryview | bytes, present: int) -> None:
    """Queue the commands that write a value over one of `present` bytes, which is watched; 0: over nothing."""
    if len(value) != present:
        pipe.set(key, value)
        return
    view = memoryview(value)
    for first in range(0, present, CHUNK_BYTES):
        pipe.setrange(key, first, view[first : first + CHUNK_BYTES])


def weights_reads(key: str, layout: Layout) -> Iterator[tuple[Any, ...]]:
    """What to read of an adapter's safetensors file, for `read_together`."""
    begin = len(layout.header)
    yield "strlen", key
    yield "getrange", key, 0, begin - 1
    for first in range(begin, layout.file_bytes, CHUNK_BYTES):
        yield "getrange", key, first, min(first + CHUNK_BYTES, layout.file_bytes) - 1


def values_and_stamp(layout: Layout, replies: Sequence[Any]) -> tuple[Sequence[bytes], str] | None:
    """Values, chunk by chunk, and stamp of the file whose `weights_reads` were answered so; None if there is none.

    Raises:
        SpecError: if it is not a file of that layout.
    """
    length, header, *values = replies
    if not length:
        return None
    check_file(layout, length, header)
    return values, stamp_of(header)
