"""An update's values as its parts, of at most 1 MiB each: self-contained msgpack frames.

A frame holds its format, the index of its first value in the layout, the number of values, the scales of the blocks
and the data (see `fedmoe.protocol.formats`). So a part can be checked, decoded and folded without the others, and
decoding runs no code from it.
"""

import math
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import msgpack
import torch

from fedmoe.errors import UpdateError
from fedmoe.protocol.formats import EXACT, FORMATS, MAX_VALUES_PER_PART, Encoded, Format
from fedmoe.protocol.update import PART_BYTES
from fedmoe.util.threads import ALONE, Threads

_FRAME_FIELDS = frozenset({"format", "first", "count", "scales", "data"})


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


def encode(
    flat: torch.Tensor, wire_format: str, *, minus: torch.Tensor | None = None, threads: Threads = ALONE
) -> Iterator[bytes]:
    """Encode an update Δ (n,) fp32, or the difference to `minus` (n,), as its parts, in order of the layout."""
    form = FORMATS[wire_format]
    flat = flat.contiguous()

    def encoded(_: int, first: int) -> bytes:
        return _part(form, first, len(flat), _encoded(form, flat, minus, first))

    return threads.in_order(encoded, range(0, len(flat), form.values_per_part))


def encode_to(
    out: memoryview,
    flat: torch.Tensor,
    wire_format: str,
    *,
    minus: torch.Tensor | None = None,
    threads: Threads = ALONE,
) -> None:
    """Write the parts that `encode` makes to `out` (uint8), one after the other; it has the sum of `part_lengths`."""
    form = FORMATS[wire_format]
    flat = flat.contiguous()
    firsts = range(0, len(flat), form.values_per_part)
    ends = list(accumulate(part_lengths(len(flat), wire_format), initial=0))

    def write(index: int, first: int) -> None:
        here = slice(first, first + form.values_per_part)
        count = len(flat[here])
        opening, middle = _frame_around(form, first, count)
        part = out[ends[index] : ends[index + 1]]
        scales = slice(len(opening), len(opening) + form.scale_bytes(count))
        data = slice(scales.stop + len(middle), len(part))
        part[: scales.start], part[scales.stop : data.start] = opening, middle
        form.encode_to(flat[here], None if minus is None else minus[here], part[scales], part[data])

    for _ in threads.in_order(write, firsts):
        pass


class EncodedUpdate(NamedTuple):
    """An update that was cut from the training: its parts, and the L2 norm of what they encode."""

    wire_format: str
    parts: tuple[bytes, ...]
    norm: float


def cut(flat: torch.Tensor, wire_format: str, *, minus: torch.Tensor | None = None) -> EncodedUpdate:
    """Encode as `encode` does, with the norm; it is NaN or infinite only if a value is."""
    form = FORMATS[wire_format]
    flat = flat.contiguous()
    parts, squares = [], 0.0
    for first in range(0, len(flat), form.values_per_part):
        one = _encoded(form, flat, minus, first)
        squares += one.squares()
        parts.append(_part(form, first, len(flat), one))
    return EncodedUpdate(wire_format, tuple(parts), math.sqrt(squares))


def _encoded(form: Format, flat: torch.Tensor, minus: torch.Tensor | None, first: int) -> Encoded:
    here = slice(first, first + form.values_per_part)
    return form.encode(flat[here], None if minus is None else minus[here])


def _part(form: Format, first: int, numel: int, encoded: Encoded) -> bytes:
    opening, middle = _frame_around(form, first, min(form.values_per_part, numel - first))
    return b"".join((opening, encoded.scales, middle, encoded.data))


@dataclass(frozen=True, slots=True)
class Frame:
    """One part of an update, opened: what it holds, and the place `here` of its values in the layout."""

    form: Format
    index: int
    here: slice
    scales: memoryview
    data: memoryview

    def decode(self, out: torch.Tensor) -> torch.Tensor:
        """The values (n,) fp32, decoded into `out` (n,); in format fp32 a read-only view of the part.

        Raises:
            UpdateError: if a scale is not finite.
        """
        try:
            return self.form.decode(self.scales, self.data, out)
        except UpdateError as error:
            raise self._named(error) from error

    def fold(self, now: torch.Tensor, factor: float, out: torch.Tensor, scratch: torch.Tensor) -> float:
        """Write `now` + factor × Δ to `out` at this part's place, (numel,) fp32 each; returns the part's squared norm.

        `out` may be `now`; for `scratch` see `scratch_values`. Raises like `decode`; `out` is then undefined.
        """
        here = self.here
        small = scratch[: here.stop - here.start]
        try:
            return self.form.fold(self.scales, self.data, now[here], factor, out[here], small)
        except UpdateError as error:
            raise self._named(error) from error

    def _named(self, error: UpdateError) -> UpdateError:
        return UpdateError(f"part {self.index} {error}", about=error.about)


def open_part(part: bytes, index: int, wire_format: str, numel: int) -> Frame:
    """Open part `index` of an update of `numel` values.

    Raises:
        UpdateError: if it does not match this format and layout.
    """
    form = FORMATS[wire_format]
    first = index * form.values_per_part
    count = min(form.values_per_part, numel - first)
    if count <= 0:
        raise UpdateError(f"part {index} is one too many for {numel} values", about="parts")
    try:
        scales, data = _open(part, form, first, count)
    except UpdateError as error:
        raise UpdateError(f"part {index} {error}", about=error.about) from error
    return Frame(form, index, slice(first, first + count), scales, data)


def check_complete(n_parts: int, wire_format: str, numel: int) -> None:
    """Raise UpdateError if so many parts, each with the values at its place, are not a whole update."""
    held = min(n_parts * FORMATS[wire_format].values_per_part, numel)
    if held != numel:
        raise UpdateError(f"the parts hold {held} values, expected {numel}", about="values")


def frames(parts: Iterable[bytes], wire_format: str, numel: int) -> Iterator[Frame]:
    """Open the parts of one update of `numel` values one by one.

    Raises:
        UpdateError: if a part does not match this format and layout, or parts are missing.
    """
    n_parts = 0
    for part in parts:
        yield open_part(part, n_parts, wire_format, numel)
        n_parts += 1
    check_complete(n_parts, wire_format, numel)


def decode(parts: Iterable[bytes], wire_format: str, out: torch.Tensor) -> None:
    """Decode the parts of one update Δ into `out` (n,) fp32.

    Raises:
        UpdateError: if a part does not match this format and layout; `out` is then undefined.
    """
    for frame in frames(parts, wire_format, len(out)):
        values = frame.decode(out[frame.here])
        if wire_format == EXACT:
            out[frame.here].copy_(values)


def add(
    parts: Iterable[bytes],
    wire_format: str,
    now: torch.Tensor,
    *,
    factor: float,
    out: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Write `now` + factor × Δ to `out`, (numel,) fp32 each and possibly the same; for `scratch` see `scratch_values`.

    Raises:
        UpdateError: if a part does not match this format and layout; `out` is then undefined.
    """
    for frame in frames(parts, wire_format, len(out)):
        frame.fold(now, factor, out, scratch)


def scratch_values(numel: int) -> int:
    """Values in the largest part of an update of `numel` values, in any format: so many has a scratch tensor (fp32)."""
    return min(MAX_VALUES_PER_PART, numel)


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
