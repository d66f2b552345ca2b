"""Weights that are too long for one Redis string: the strings that hold them. Pure.

A Redis string holds at most 512 MiB. Of a longer file, the key `weights` (and `server_state`) holds only the header,
with the names of the tensors and the stamp; the values lie in parts, under keys that name the commit that wrote them.
A part never changes. So a reader can read part by part what one commit wrote, while others commit: the next commit
that writes the weights removes the parts, and a reader that misses one begins again.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from fedmoe.protocol.fields import from_json

MAX_STRING_BYTES = 512 * 1024 * 1024  # the limit of a Redis string
WHOLE_BYTES = MAX_STRING_BYTES  # a longer file lies in parts
PART_BYTES = (
    64 * 2**20 - 4096
)  # with the few bytes that Redis adds, 64 MiB of its allocator, whose next size is 80


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsParts:
    """What `meta` says of the parts of weights and server state; false if each of them is one string.

    Args:
        commit: that wrote them; it names them. It is not the stamp in the header: two aggregators may write the same
            weights at once, and each writes parts of its own.
        count: of the parts of one file; both files have the same layout.
        n_bytes: of one whole file, header and values.
    """

    commit: str = ""
    count: int = 0
    n_bytes: int = 0

    def __bool__(self) -> bool:
        return bool(self.count)

    @classmethod
    def of(cls, commit: str, file: bytes | memoryview) -> "WeightsParts":
        """The parts in which this commit writes a safetensors file; false if it is short enough for one string."""
        if len(file) <= WHOLE_BYTES:
            return cls()
        return cls(commit=commit, count=-(-len(values_bytes(file)) // PART_BYTES), n_bytes=len(file))

    def to_json(self) -> str:
        """The field of meta; "" without parts."""
        return json.dumps(asdict(self)) if self else ""

    @classmethod
    def from_json(cls, text: str) -> "WeightsParts":
        """Parse the field of meta. Raises ValueError if it is malformed."""
        if not text:
            return cls()
        found = from_json(cls, text, "parts")
        if found.count < 1 or found.n_bytes < 1:
            raise ValueError(f"parts is {text!r}")
        return found

    @property
    def lost(self) -> str:
        """What is wrong if one of them is missing, as the end of a sentence."""
        return f"of the {self.count} parts of its weights, which commit {self.commit} wrote, one is missing"

    @classmethod
    def in_meta(cls, raw: Mapping[bytes, bytes] | None) -> "WeightsParts":
        """The parts that a meta hash names; none if the field is missing or malformed (parsing meta reports that)."""
        try:
            return cls.from_json((raw or {}).get(b"parts", b"").decode())
        except ValueError:
            return cls()


def values_bytes(file: bytes | memoryview) -> memoryview:
    """The bytes of the values in an adapter's safetensors file, without its header, not copied."""
    return memoryview(file)[8 + int.from_bytes(file[:8], "little") :]


def header_bytes(file: bytes | memoryview) -> memoryview:
    """The header of a safetensors file, not copied: what the key holds if the values lie in parts."""
    return memoryview(file)[: len(file) - len(values_bytes(file))]


def values_parts(file: bytes | memoryview) -> Iterator[memoryview]:
    """The values of a safetensors file in parts, not copied."""
    values = values_bytes(file)
    for first in range(0, len(values), PART_BYTES):
        yield values[first : first + PART_BYTES]
