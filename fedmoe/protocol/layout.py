"""One contiguous fp32 vector for a whole adapter, and the safetensors file that is that vector.

A `Layout` fixes which value of the flat vector belongs to which tensor. The safetensors header of a layout
always has the same length, so an adapter's file is `header + raw bytes of the vector`. An `AdapterBuffer` keeps both
in one block of memory: updates are folded into it, and it is sent to Redis without copying or serialising.

The header's metadata holds a stamp: the id of the commit that wrote these weights. So the file itself shows whether
these are the weights that the expert's meta names.
"""

import hashlib
import json
import math
import mmap
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from fedmoe.errors import SpecError

FLOAT_BYTES = 4
_DTYPES = {"fp32": "F32", "bf16": "BF16"}  # our name -> safetensors'
# `values_of` returns tensors over read-only memory. torch warns that it cannot protect them; nothing writes to them.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

STAMP_CHARS = 16  # length of the stamp in the header; a shorter commit id is padded with spaces
_BEFORE_STAMP = b'{"__metadata__":{"commit":"'
_STAMP_AT = slice(8 + len(_BEFORE_STAMP), 8 + len(_BEFORE_STAMP) + STAMP_CHARS)
STAMPED_BYTES = _STAMP_AT.stop  # a file's first bytes, up to the end of its stamp


@dataclass(frozen=True)
class Layout:
    """Names and shapes of an adapter's tensors, in their order in the flat vector.

    Raises:
        SpecError: if a name occurs twice, a dimension is not a positive integer, or there is no tensor.
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        if not self.tensors:
            raise SpecError(
                "the layout has no tensors: do the LoRA targets name modules of the base model?",
                about="targets",
            )
        names = [name for name, _ in self.tensors]
        if len(set(names)) != len(names):
            raise SpecError("the layout names a tensor twice", about="tensors")
        for name, shape in self.tensors:
            if not all(isinstance(size, int) and size > 0 for size in shape):
                raise SpecError(f"tensor {name!r} has the impossible shape {list(shape)}", about="shape")

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, Sequence[int]]]) -> "Layout":
        """Build a layout from (name, shape) pairs, sorted by name so that every party gets the same one."""
        return cls(tuple(sorted((name, tuple(shape)) for name, shape in tensors)))

    @cached_property
    def numel(self) -> int:
        """Values in the flat vector."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    @cached_property
    def header(self) -> bytes:
        """The safetensors header with an empty stamp: 8 bytes of length, then JSON, padded to a multiple of 8."""
        return self._header("F32", FLOAT_BYTES)

    def _header(self, dtype: str, value_bytes: int) -> bytes:
        offset = 0
        table: dict[str, object] = {"__metadata__": {"commit": " " * STAMP_CHARS, "format": "pt"}}
        for name, shape in self.tensors:
            end = offset + math.prod(shape) * value_bytes
            table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def bf16_file(self, file: bytes | memoryview) -> bytes:
        """A copy of an adapter's safetensors file with each value rounded to the nearest bf16; it keeps its stamp.

        Raises:
            SpecError: if the file does not have this layout.
        """
        values = values_of(self, file).to(torch.bfloat16).view(torch.int16)
        return stamped(self._header("BF16", 2) + values.numpy().tobytes(), stamp_of(file))

    @property
    def file_bytes(self) -> int:
        """Size of the safetensors file."""
        return len(self.header) + self.numel * FLOAT_BYTES

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of the tensors in `flat` (numel,); writing to one writes to `flat`."""
        if flat.shape != (self.numel,):
            raise SpecError(
                f"expected a flat vector of {self.numel} values, got shape {list(flat.shape)}", about="shape"
            )
        views, offset = {}, 0
        for name, shape in self.tensors:
            size = math.prod(shape)
            views[name] = flat[offset : offset + size].view(shape)
            offset += size
        return views


def layout_of(file: bytes | memoryview, dtype: Literal["fp32", "bf16"] = "fp32") -> Layout:
    """The layout of an adapter's safetensors file, in the order of its tensors.

    Raises:
        SpecError: if the file is not safetensors, or holds values of another dtype.
    """
    try:
        table = json.loads(bytes(file[8 : 8 + int.from_bytes(file[:8], "little")]))
        table.pop("__metadata__", None)
        if any(tensor["dtype"] != _DTYPES[dtype] for tensor in table.values()):
            raise SpecError(
                f"the adapter's weights in Redis are not all {dtype}: was the key overwritten?", about="dtype"
            )
        ordered = sorted(table, key=lambda name: table[name]["data_offsets"])
        return Layout(tuple((name, tuple(table[name]["shape"])) for name in ordered))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(
            f"the adapter's weights in Redis are not a safetensors file ({error!r}): was the key overwritten?",
            about="safetensors",
        ) from error


def check_file(layout: Layout, length: int, begin: bytes) -> None:
    """Raise SpecError if a file of `length` bytes that starts with `begin` is not an adapter of this layout."""
    at, header = _STAMP_AT, layout.header
    same = begin[: at.start] == header[: at.start] and begin[at.stop : len(header)] == header[at.stop :]
    if length != layout.file_bytes or not same:
        raise SpecError(
            f"the stored weights ({length} bytes) are not an adapter of this spec "
            f"({layout.file_bytes} bytes); was the key written by something else?",
            about="weights",
        )


def stamp_of(begin: bytes | memoryview) -> str:
    """The commit id in the stamp of an adapter's file that starts with `begin`; "" if it has no stamp."""
    begin = bytes(begin[:STAMPED_BYTES])
    if not begin[8:].startswith(_BEFORE_STAMP):
        return ""
    return begin[_STAMP_AT].decode(errors="backslashreplace").strip()


def stamped(file: bytes | memoryview, commit: str) -> bytes:
    """A copy of an adapter's file with another stamp."""
    view = memoryview(file)
    return b"".join((view[: _STAMP_AT.start], _stamp(commit), view[_STAMP_AT.stop :]))


def digest_of(file: bytes | memoryview) -> str:
    """SHA-256 (64 hex digits) of an adapter's file with an empty stamp: equal for equal values, whoever wrote them."""
    return hashlib.sha256(stamped(file, "")).hexdigest()


def _stamp(commit: str) -> bytes:
    stamp = commit.encode()
    if len(stamp) > STAMP_CHARS:
        raise ValueError(f"a commit id has at most {STAMP_CHARS} characters, not {len(stamp)}")
    return stamp.ljust(STAMP_CHARS)


def values_of(layout: Layout, file: bytes | memoryview) -> torch.Tensor:
    """The values (numel,) fp32 of an adapter's safetensors file, read-only and not copied.

    Raises:
        SpecError: if the file does not have that layout.
    """
    n_bytes = len(layout.header)
    check_file(layout, len(file), bytes(file[:n_bytes]))
    return torch.frombuffer(file, dtype=torch.float32, offset=n_bytes, count=layout.numel)


def values_of_chunks(
    layout: Layout, chunks: Iterable[bytes | memoryview], out: torch.Tensor | None = None
) -> torch.Tensor:
    """The values (numel,) fp32 of these bytes, copied, to `out` if it is given; each chunk holds whole values."""
    values, at = torch.empty(layout.numel, dtype=torch.float32) if out is None else out, 0
    for chunk in chunks:
        part = torch.frombuffer(chunk, dtype=torch.float32)
        values[at : at + len(part)].copy_(part)
        at += len(part)
    return values


class AdapterBuffer:
    """An adapter as one block of memory: `file` is the safetensors file, `flat` its values (numel,) fp32.

    Both are views of the same bytes: a fold into `flat` shows in `file` at once. The values start as zeros.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        # Zero pages take no memory until they are written, and the block is returned to the system as a whole.
        self._block = mmap.mmap(-1, layout.file_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._block[: len(layout.header)] = layout.header
        self.flat = torch.frombuffer(
            self._block, dtype=torch.float32, offset=len(layout.header), count=layout.numel
        )

    @property
    def file(self) -> memoryview:
        """The safetensors file, read-only and not copied."""
        return memoryview(self._block).toreadonly()

    def load(self, file: bytes) -> None:
        """Copy values and stamp from a safetensors file; SpecError if its layout differs."""
        self.flat.copy_(values_of(self.layout, file))
        self.stamp(stamp_of(file))

    def stamp(self, commit: str) -> None:
        """Write the commit id of these weights into the file's header."""
        self._block[_STAMP_AT] = _stamp(commit)

    def same_values(self, file: bytes) -> bool:
        """True if a file of this layout holds the same values, bit for bit; the stamp is ignored."""
        first = len(self.layout.header)
        return memoryview(file)[first:] == self.file[first:]
