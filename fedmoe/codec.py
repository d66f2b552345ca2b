"""How the values of an update travel: parts of at most 1 MiB, each a msgpack frame that stands on its own.

A frame says its format, where its first value lies in the layout, how many values follow, the scales of the
blocks and the bytes. So a part can be checked, decoded and folded without the others, and never by running
anything.

    format  bytes a value  what is lost
    fp32    4              nothing
    bf16    2              8 of 24 significant bits
    int8    1.0625         to 1/254 of the largest value of each block of 64

What a format loses is not lost to the training: it stays in the worker's progress (see producers/ledger.py).
"""

import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgpack
import torch

from fedmoe.errors import UpdateError
from fedmoe.update import PART_BYTES

FRAME_BYTES = 256  # room for the frame around the values
BLOCK = 64  # values that share a scale; every part but the last is a multiple of it
_FRAME_FIELDS = frozenset({"format", "first", "count", "scales", "data"})


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    # A private copy: torch must not be handed read-only memory it could write to.
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


@dataclass(frozen=True, slots=True)
class Format:
    """One wire format: bytes a value and bytes a block's scale (0 without scales)."""

    name: str
    value_bytes: int
    scale_bytes: int
    dtype: torch.dtype

    @property
    def values_per_part(self) -> int:
        """Values in a full part, a multiple of BLOCK."""
        return (PART_BYTES - FRAME_BYTES) // (BLOCK * self.value_bytes + self.scale_bytes) * BLOCK

    @property
    def part_bytes(self) -> int:
        """Bytes of values and scales in a full part."""
        return self.values_per_part * self.value_bytes + self.scales(self.values_per_part) * self.scale_bytes

    def scales(self, count: int) -> int:
        """Number of scales that `count` values have."""
        return -(-count // BLOCK) if self.scale_bytes else 0

    def encode(self, values: torch.Tensor) -> tuple[bytes, bytes]:
        """Encode (n,) fp32 values as (bytes of the scales, bytes of the values)."""
        if not self.scale_bytes:
            return b"", _raw(values.to(self.dtype))
        blocks = torch.zeros(self.scales(len(values)) * BLOCK)
        blocks[: len(values)] = values
        blocks = blocks.view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1) / 127
        quotient = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        codes = quotient.round_().clamp_(-127, 127).to(torch.int8)
        return _raw(scales), _raw(codes.view(-1)[: len(values)])

    def decode(self, scales: bytes, data: bytes, out: torch.Tensor) -> None:
        """Write the decoded values into `out` (n,) fp32; lengths were checked before."""
        values = _tensor(data, self.dtype)
        out.copy_(values)
        if self.scale_bytes:
            factors = _tensor(scales, torch.float32)
            whole = len(out) // BLOCK * BLOCK
            out[:whole].view(-1, BLOCK).mul_(factors[: whole // BLOCK].unsqueeze(1))
            if whole < len(out):
                out[whole:].mul_(factors[-1])


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("fp32", 4, 0, torch.float32),
        Format("bf16", 2, 0, torch.bfloat16),
        Format("int8", 1, 4, torch.int8),
    )
}


def part_count(wire_format: str, numel: int) -> int:
    """How many parts an update of `numel` values has in this format."""
    return -(-numel // FORMATS[wire_format].values_per_part)


def encode(flat: torch.Tensor, wire_format: str) -> Iterator[bytes]:
    """Encode an update Δ (n,) fp32 as its parts, in order of the layout."""
    form = FORMATS[wire_format]
    for first in range(0, len(flat), form.values_per_part):
        values = flat[first : first + form.values_per_part]
        scales, data = form.encode(values)
        frame = {"format": form.name, "first": first, "count": len(values), "scales": scales, "data": data}
        yield msgpack.packb(frame)


def decode(parts: Iterable[bytes], wire_format: str, out: torch.Tensor) -> None:
    """Decode the parts of one update into `out` (n,) fp32.

    Raises:
        UpdateError: if a part is not what this format and layout call for; `out` is then undefined.
    """
    form = FORMATS[wire_format]
    expected = 0
    for index, part in enumerate(parts):
        count = min(form.values_per_part, len(out) - expected)
        if count <= 0:
            raise UpdateError(f"part {index} is one too many for {len(out)} values")
        frame = _frame(part, index)
        for name, want in (("format", form.name), ("first", expected), ("count", count)):
            if frame[name] != want:
                # reprlib: what a worker wrote may be a megabyte long, or nested deeper than repr can follow.
                raise UpdateError(f"part {index} says {name} {reprlib.repr(frame[name])}, expected {want!r}")
        lengths = (("scales", form.scales(count) * form.scale_bytes), ("data", count * form.value_bytes))
        for name, length in lengths:
            if not isinstance(frame[name], bytes) or len(frame[name]) != length:
                raise UpdateError(f"part {index} does not hold {length} bytes of {name}")
        form.decode(frame["scales"], frame["data"], out[expected : expected + count])
        expected += count
    if expected != len(out):
        raise UpdateError(f"the parts hold {expected} values, expected {len(out)}")


def _frame(part: bytes, index: int) -> dict[str, Any]:
    if len(part) > PART_BYTES:
        raise UpdateError(f"part {index} has {len(part)} bytes, allowed are {PART_BYTES}")
    try:
        # The limits keep nested empty containers from taking a hundred times the part's size.
        frame = msgpack.unpackb(part, max_array_len=0, max_map_len=len(_FRAME_FIELDS))
    except Exception as error:  # msgpack raises half a dozen unrelated types on garbage
        raise UpdateError(f"part {index} is not a msgpack frame ({type(error).__name__})") from error
    if not isinstance(frame, dict) or frame.keys() != _FRAME_FIELDS:
        raise UpdateError(f"part {index} is not a map of {', '.join(sorted(_FRAME_FIELDS))}")
    return frame
