"""Large values, read and written in pieces of 1 MiB inside one MULTI.

Redis's allocator, jemalloc, gives every block above 8 MiB back to the system at once (its `oversize_threshold`). So
each SET of larger weights, and each answer to a GET of them, goes to fresh pages, and that costs more than its bytes.
Pieces are smaller than that, and SETRANGE writes them over the old value in place. `ops/bench.sh --only machine`
measures the difference.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fedmoe.layout import Layout, check_file

PIECE_BYTES = 1024 * 1024
IN_PLACE_BYTES = 4 * 1024 * 1024  # a shorter value is written as a whole


def put(pipe: Any, key: str, value: memoryview | bytes, present: int) -> None:
    """Queue the commands that write a value over one of `present` bytes, 0 for none; what was there is watched."""
    if len(value) != present or present < IN_PLACE_BYTES:
        pipe.set(key, value)
        return
    view = memoryview(value)
    for first in range(0, present, PIECE_BYTES):
        pipe.setrange(key, first, view[first : first + PIECE_BYTES])


def weights_reads(key: str, layout: Layout) -> Iterator[tuple[Any, ...]]:
    """What to read of an adapter's safetensors file, for `read_together`."""
    begin = len(layout.header)
    yield "strlen", key
    yield "getrange", key, 0, begin - 1
    for first in range(begin, layout.file_bytes, PIECE_BYTES):
        yield "getrange", key, first, min(first + PIECE_BYTES, layout.file_bytes) - 1


def weights_of(layout: Layout, replies: Sequence[Any]) -> torch.Tensor | None:
    """The values (numel,) fp32 of the file whose `weights_reads` were answered so; None if there is none.

    Raises:
        SpecError: if it is not a file of that layout.
    """
    length, header, *pieces = replies
    if not length:
        return None
    check_file(layout, length, header)
    weights = torch.empty(layout.numel)
    at = 0
    for piece in pieces:
        values = torch.frombuffer(piece, dtype=torch.float32)
        weights[at : at + len(values)].copy_(values)
        at += len(values)
    return weights
