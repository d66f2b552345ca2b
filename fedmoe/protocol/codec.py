"""Wire format of an update's values: parts of at most 1 MiB, each a self-contained msgpack frame.

A frame holds its format, the index of its first value in the layout, the number of values, the scales of the blocks
and the data. So a part can be checked, decoded and folded without the others, and decoding runs no code from it.

    format  bytes a value  loss
    fp32    4              nothing
    bf16    2              16 of 24 significant bits
    int8    1.0625         to 1/254 of the largest value of each block of 64
    int4    0.53125        to 1/14 of the largest value of each block of 64

The training does not lose the quantisation error: it stays in the worker's progress (see producers/ledger.py).

int8 and int4 quantise a value to an integer code (-127..127, -7..7) times its block's scale. Two int4 codes a and b
make one signed byte a + 16 b; a belongs to the first half of the part's values, b to the second (with an odd count,
the last byte has b = 0). Every byte can be decoded: a byte that no encoder writes gives codes between -8 and 8.
"""

import math
import reprlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgpack
import torch

from fedmoe.errors import UpdateError
from fedmoe.protocol.update import PART_BYTES

EXACT = "fp32"  # lossless: the values need no decoding
FRAME_BYTES = 256  # room for the frame around the values
BLOCK = 64  # values that share a scale; every part but the last is a multiple of it
# As many as fit into a part in bf16 (fp32: half as many): a fold holds one decoded part, at most 2 MiB.
MAX_VALUES_PER_PART = (PART_BYTES - FRAME_BYTES) // (BLOCK * 2) * BLOCK
_FRAME_FIELDS = frozenset({"format", "first", "count", "scales", "data"})
# Blocks encoded at once: allocating memory costs more than encoding, so all chunks share one small scratch tensor.
_CHUNK = 4096
_TINY = torch.finfo(torch.float32).tiny

# Parts are decoded without a copy. torch warns that it cannot protect the read-only buffer; nothing writes to it.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


@dataclass(frozen=True, slots=True)
class Format:
    """One wire format.

    Args:
        name: in the spec and the frames.
        bits: per value.
        dtype: of the values; of the codes (int8) if they are quantised.
        limit: the largest code, 0 if values are not quantised.
        scale: dtype of the blocks' scales.
    """

    name: str
    bits: int
    dtype: torch.dtype
    limit: int = 0
    scale: torch.dtype = torch.float32

    @property
    def values_per_part(self) -> int:
        """Values in a full part."""
        return MAX_VALUES_PER_PART * 16 // max(16, self.bits)

    @property
    def part_bytes(self) -> int:
        """Bytes of values and scales in a full part."""
        return self.data_bytes(self.values_per_part) + self.scale_bytes(self.values_per_part)

    def data_bytes(self, count: int) -> int:
        """Bytes of `count` values."""
        return -(-count * self.bits // 8)

    def scale_bytes(self, count: int) -> int:
        """Bytes of the scales of `count` values."""
        return -(-count // BLOCK) * self.scale.itemsize if self.limit else 0

    def encode(self, values: torch.Tensor) -> tuple[memoryview, memoryview]:
        """Encode (n,) fp32 values as (bytes of the scales, bytes of the values)."""
        if not self.limit:
            return memoryview(b""), _bytes(values.to(self.dtype))
        n = len(values)
        if n % BLOCK:
            values = torch.nn.functional.pad(values, (0, -n % BLOCK))
        blocks = values.view(-1, BLOCK)
        scales = torch.empty(len(blocks), dtype=self.scale)
        codes = torch.empty(blocks.shape, dtype=torch.int8)
        scratch = torch.empty(min(len(blocks), _CHUNK), BLOCK)
        chunks = (torch.split(tensor, _CHUNK) for tensor in (blocks, scales, codes))
        for block, scale, code in zip(*chunks, strict=True):
            steps = torch.abs(block, out=scratch[: len(block)])
            scale.copy_(_shorten(steps.amax(dim=1).div_(self.limit), self.scale))
            torch.div(block, scale.float().clamp(min=_TINY).unsqueeze(1), out=steps)
            code.copy_(steps.round_())
        flat = codes.view(-1)
        if self.bits == 4:
            half = -(-n // 2)
            return _bytes(scales), _bytes(flat[:half].add_(flat[half : 2 * half], alpha=16))
        return _bytes(scales), _bytes(flat[:n])

    def decode(self, scales: memoryview, data: memoryview, out: torch.Tensor) -> torch.Tensor:
        """The values (n,) fp32: decoded into `out`; fp32 data as a view. The caller has checked the lengths.

        Raises:
            UpdateError: if a scale is not finite.
        """
        if not self.limit:
            values = torch.frombuffer(data, dtype=self.dtype)
            return values if values.dtype == out.dtype else out.copy_(values)
        factors = torch.frombuffer(scales, dtype=self.scale).float()
        if not math.isfinite(factors.abs().amax()):  # amax is NaN if one of them is
            raise UpdateError("has a scale that is not finite (NaN or infinity)", about="scales")
        codes = torch.frombuffer(data, dtype=torch.int8)
        if self.bits == 4:
            _unpack(codes, out)
        else:
            out.copy_(codes)
        whole = len(out) // BLOCK * BLOCK
        out[:whole].view(-1, BLOCK).mul_(factors[: whole // BLOCK].unsqueeze(1))
        if whole < len(out):
            out[whole:].mul_(factors[-1])
        return out


def _shorten(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Reduce the scales, in place, to the precision of their dtype.

    bf16 scales are truncated, not rounded up, so that no scale exceeds the largest value of its block divided by 7.
    Seven times a scale of 8 significant bits is exact in fp32, so encoding decoded values gives the same bytes again.
    """
    if dtype == torch.bfloat16:
        scales.view(torch.int32).bitwise_and_(-(2**16))
    return scales


def _unpack(pairs: torch.Tensor, out: torch.Tensor) -> None:
    """Split the bytes a + 16 b (half,) int8 into the codes a and b, in `out` (n,) fp32.

    For a byte that no encoder writes, adding 8 may wrap around.
    """
    half = len(pairs)
    codes = torch.add(pairs, 8).bitwise_right_shift_(4)
    out[half:].copy_(codes[: len(out) - half])
    out[:half].copy_(torch.sub(pairs, codes, alpha=16, out=codes))


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(EXACT, 32, torch.float32),
        Format("bf16", 16, torch.bfloat16),
        Format("int8", 8, torch.int8, 127),
        Format("int4", 4, torch.int8, 7, torch.bfloat16),
    )
}


def part_count(numel: int, wire_format: str) -> int:
    """How many parts an update of `numel` values has."""
    return -(-numel // FORMATS[wire_format].values_per_part)


def part_lengths(numel: int, wire_format: str) -> list[int]:
    """Bytes of each part that `encode` makes of `numel` values."""
    form = FORMATS[wire_format]
    counts = [
        (first, min(form.values_per_part, numel - first)) for first in range(0, numel, form.values_per_part)
    ]
    frames = [sum(map(len, _frame_around(form, first, count))) for first, count in counts]
    return [
        frame + form.scale_bytes(count) + form.data_bytes(count)
        for frame, (_, count) in zip(frames, counts, strict=True)
    ]


def encode(flat: torch.Tensor, wire_format: str, *, minus: torch.Tensor | None = None) -> Iterator[bytes]:
    """Encode an update Δ (n,) fp32, or the difference to `minus` (n,), as its parts, in order of the layout."""
    form = FORMATS[wire_format]
    flat = flat.contiguous()
    for first in range(0, len(flat), form.values_per_part):
        here = slice(first, first + form.values_per_part)
        values = flat[here] if minus is None else flat[here] - minus[here]
        scales, data = form.encode(values)
        opening, middle = _frame_around(form, first, len(values))
        yield b"".join((opening, scales, middle, data))


def decode(
    parts: Iterable[bytes], wire_format: str, out: torch.Tensor, *, plus: torch.Tensor | None = None
) -> None:
    """Decode the parts of one update Δ, or Δ + `plus` (n,) fp32, into `out` (n,) fp32.

    Raises:
        UpdateError: if a part does not match this format and layout; `out` is then undefined.
    """
    for first, values in _decoded(parts, wire_format, len(out), lambda at, count: out[at : at + count]):
        here = slice(first, first + len(values))
        if plus is not None:
            torch.add(values, plus[here], out=out[here])
        elif wire_format == EXACT:
            out[here].copy_(values)


def decoded(
    parts: Iterable[bytes], wire_format: str, numel: int, scratch: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """Decode the parts of one update of `numel` values one by one: index of a part's first value, and its values.

    A part's values, (n,) fp32, lie in `scratch`, (scratch_values(...),) fp32, until the next part is decoded; in
    format fp32 they are a read-only view of the part.

    Raises:
        UpdateError: if a part does not match this format and layout, or parts are missing.
    """
    return _decoded(parts, wire_format, numel, lambda _, count: scratch[:count])


def scratch_values(numel: int) -> int:
    """Values in the largest part of an update of `numel` values, in any format."""
    return min(MAX_VALUES_PER_PART, numel)


def _decoded(
    parts: Iterable[bytes], wire_format: str, numel: int, into: Callable[[int, int], torch.Tensor]
) -> Iterator[tuple[int, torch.Tensor]]:
    form = FORMATS[wire_format]
    first = 0
    for index, part in enumerate(parts):
        count = min(form.values_per_part, numel - first)
        if count <= 0:
            raise UpdateError(f"part {index} is one too many for {numel} values", about="parts")
        try:
            values = form.decode(*_open(part, form, first, count), into(first, count))
        except UpdateError as error:
            raise UpdateError(f"part {index} {error}", about=error.about) from error
        yield first, values
        first += count
    if first != numel:
        raise UpdateError(f"the parts hold {first} values, expected {numel}", about="values")


def _bin_header(length: int) -> bytes:
    """The header that msgpack writes before `length` bytes."""
    if length < 2**8:
        return b"\xc4" + length.to_bytes(1)
    return b"\xc5" + length.to_bytes(2) if length < 2**16 else b"\xc6" + length.to_bytes(4)


def _frame_around(form: Format, first: int, count: int) -> tuple[bytes, bytes]:
    """The bytes before the scales, and those between scales and data, in a part's msgpack frame."""
    fields = msgpack.packb({"format": form.name, "first": first, "count": count})
    opening = (
        bytes((fields[0] + 2,)) + fields[1:] + msgpack.packb("scales") + _bin_header(form.scale_bytes(count))
    )
    return opening, msgpack.packb("data") + _bin_header(form.data_bytes(count))


def _open(part: bytes, form: Format, first: int, count: int) -> tuple[memoryview, memoryview]:
    """The scales and the data of a part.

    Raises:
        UpdateError: if the part does not hold these values.
    """
    opening, middle = _frame_around(form, first, count)
    end = len(opening) + form.scale_bytes(count)
    begin = end + len(middle)
    # If the frame is byte for byte what `encode` writes, nothing is parsed or copied.
    if (
        part.startswith(opening)
        and part.startswith(middle, end)
        and len(part) == begin + form.data_bytes(count)
    ):
        view = memoryview(part)
        return view[len(opening) : end], view[begin:]
    frame = _frame(part)
    for name, want in (("format", form.name), ("first", first), ("count", count)):
        if frame[name] != want:
            # reprlib: a worker's value may be a megabyte long, or nested deeper than repr can follow.
            raise UpdateError(f"says {name} {reprlib.repr(frame[name])}, expected {want!r}", about=name)
    for name, length in (("scales", form.scale_bytes(count)), ("data", form.data_bytes(count))):
        if not isinstance(frame[name], bytes) or len(frame[name]) != length:
            raise UpdateError(f"does not hold {length} bytes of {name}", about=name)
    return memoryview(frame["scales"]), memoryview(frame["data"])


def _frame(part: bytes) -> dict[str, Any]:
    if len(part) > PART_BYTES:
        raise UpdateError(f"has {len(part)} bytes, allowed are {PART_BYTES}", about="length")
    try:
        # The limits keep nested empty containers from taking a hundred times the part's size.
        frame = msgpack.unpackb(part, max_array_len=0, max_map_len=len(_FRAME_FIELDS))
    except Exception as error:  # msgpack raises half a dozen unrelated types on garbage
        raise UpdateError(f"is not a msgpack frame ({type(error).__name__})", about="msgpack") from error
    if not isinstance(frame, dict) or frame.keys() != _FRAME_FIELDS:
        raise UpdateError(f"is not a map of {', '.join(sorted(_FRAME_FIELDS))}", about="fields")
    return frame
