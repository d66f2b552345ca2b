"""An update: one published LoRA delta. Only its header decides; its stream entry is a doorbell.

The header names the update (run, seq) and its predecessor `prev`: a worker's updates are a chain, and an
update may be decided only if its `prev` is the worker's last decided update. `run` is `<incarnation>-<nonce>`: the
incarnation grows with each new run of a worker, the nonce distinguishes two processes with one name.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import msgpack
import xxhash

from fedmoe.errors import UpdateError
from fedmoe.protocol.features import QUICK_DIGESTS, lacking, with_feature
from fedmoe.protocol.fields import optional

HEADER_FORMAT = 1
MAX_HEADER_BYTES = 256 * 1024
SPARE_BYTES = 256  # more than the optional fields add when a header without them is packed again
MAX_FIELDS = 64  # including `header_format`
PART_BYTES = 1024 * 1024  # a payload part is at most this long
MAX_PARTS = 1024  # enough for an adapter of 1 GiB in fp32, and of 2 GiB in int4
MAX_TEXT_CHARS = 1024
PAYLOAD_TTL_S = 7 * 24 * 3600  # of header and parts in Redis; far longer than any expected outage
_QUICK_BYTES, _SHA_BYTES = 16, 32  # of a part's digest
_RUN = re.compile(r"([0-9]{1,12})-([0-9a-f]{8})")
_MAX_INT = 2**53
_VALIDATION = ("val_loss", "val_version", "val_rows", "val_set")


class ForeignHeaderError(UpdateError):
    """A header of another release: not malformed, but this FedMoE cannot read it.

    Args:
        needs: the features or header format that a reader must know.
    """

    def __init__(self, message: str, *, about: str, needs: str) -> None:
        super().__init__(message, about=about)
        self.needs = needs


class UpdateId(NamedTuple):
    """(run, seq): the permanent name of one of a worker's updates."""

    run: str
    seq: int

    @property
    def incarnation(self) -> int:
        """The number of the worker's run; a later run has a higher one."""
        match = _RUN.fullmatch(self.run)
        return int(match[1]) if match else 0

    def __str__(self) -> str:
        return f"{self.run}:{self.seq}"


def make_run(incarnation: int, nonce: str) -> str:
    """The name of a worker's run: its incarnation and 8 random hex digits."""
    return f"{incarnation}-{nonce}"


def is_run(text: str) -> bool:
    """True if `text` is the name of a run."""
    return _RUN.fullmatch(text) is not None


class Part(NamedTuple):
    """Length in bytes and digest of one payload part: XXH3 (16 bytes), or SHA-256 (32) as earlier releases have it.

    The digest finds damage. It does not have to find forgery, because a user who may write a worker's parts may also
    write its headers.
    """

    length: int
    digest: bytes

    @classmethod
    def of(cls, data: bytes, *, quick: bool = True) -> "Part":
        """Describe a part, with a digest by XXH3 if `quick`."""
        return cls(len(data), _digest(data, _QUICK_BYTES if quick else _SHA_BYTES))

    def matches(self, data: bytes) -> bool:
        """True if `data` has this length and digest."""
        return len(data) == self.length and _digest(data, len(self.digest)) == self.digest


def _digest(data: bytes, n_bytes: int) -> bytes:
    if n_bytes == _QUICK_BYTES:
        return xxhash.xxh3_128(data).digest()
    return hashlib.sha256(data).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Everything that an update is decided by, except its values; stored under the worker's own key prefix.

    Args:
        lineage: of the expert the update was trained on.
        spec: digest of the spec.
        run, seq: the update's name.
        prev: the worker's previous update, None for its first.
        base_version: version of the expert that the worker had pulled last.
        wire_format: of the parts.
        base_fingerprint: of the weights of the worker's base model; tokenizer: of its tokenizer, "" if unknown.
        n_examples, n_tokens, steps: rows, tokens and steps it was trained on; loss: mean over these steps.
        position: the worker's data position after it, as JSON.
        parts: length and digest of each part.
        requires: the features needed to decide it (see `fedmoe.protocol.features`).
        vector, vector_rows: the worker's domain vector (see `fedmoe.protocol.vectors`), b"" if it withholds that; None
            if the update says nothing of it.
        val_loss, val_version, val_rows, val_set: a validation loss, the version it was measured on, the number of rows
            and their digest; None and "" for none. A malformed one is NaN: it decides nothing, so it refuses nothing.
        unknown: msgpack of the fields that a later FedMoE wrote, kept unchanged; b"" for none.
    """

    lineage: str
    spec: str
    run: str
    seq: int
    prev: UpdateId | None
    base_version: int
    wire_format: str
    base_fingerprint: str
    n_examples: int
    n_tokens: int
    steps: int
    loss: float
    position: str
    parts: tuple[Part, ...]
    tokenizer: str = optional("")
    requires: str = optional("")
    vector: bytes | None = optional(None)
    vector_rows: int = optional(0)
    val_loss: float | None = optional(None)
    val_version: int | None = optional(None)
    val_rows: int | None = optional(None)
    val_set: str = optional("")
    unknown: bytes = b""

    @property
    def id(self) -> UpdateId:
        """The update's name."""
        return UpdateId(self.run, self.seq)

    @property
    def payload_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.length for part in self.parts)

    def at_most(self, base_version: int) -> "Header":
        """The same update with `base_version` as an upper bound of its base.

        After a rollback of many updates, a resent update may name a base version that the expert has not reached again.
        """
        return replace(self, base_version=min(self.base_version, base_version))

    def unmeasured(self) -> "Header":
        """The same update without its validation loss."""
        return replace(self, val_loss=None, val_version=None, val_rows=None, val_set="")

    def known_by(self, knows: str, parts: Sequence[bytes]) -> "Header":
        """The same update for aggregators that know these features: with SHA-256 if they know no quick digests."""
        if QUICK_DIGESTS in knows.split() or QUICK_DIGESTS not in self.requires.split():
            return self
        described = tuple(Part.of(part, quick=False) for part in parts)
        return replace(self, parts=described, requires=with_feature(self.requires, QUICK_DIGESTS, False))

    def pack(self) -> bytes:
        """The header as msgpack."""
        content = asdict(self)
        content["prev"] = list(self.prev) if self.prev else None
        content["parts"] = [[part.length, part.digest] for part in self.parts]
        if self.vector is None:
            del content["vector"], content["vector_rows"]
        unknown = content.pop("unknown")
        if content["val_loss"] is None:  # left out: an earlier FedMoE, which lacks them, wrote the same bytes
            for name in _VALIDATION:
                del content[name]
        later = msgpack.unpackb(unknown) if unknown else {}
        return bytes(msgpack.packb({"header_format": HEADER_FORMAT} | content | later))

    @classmethod
    def unpack(cls, data: bytes) -> "Header":
        """Parse and check an untrusted header.

        Raises:
            ForeignHeaderError: if it has another format, or needs a feature that this FedMoE does not know.
            UpdateError: if it is malformed, with the reason.
        """
        if len(data) > MAX_HEADER_BYTES:
            raise UpdateError(
                f"the header has {len(data)} bytes, allowed are {MAX_HEADER_BYTES}", about="length"
            )
        try:
            # The limits keep nested containers from taking a hundred times the header's size.
            content = msgpack.unpackb(data, max_array_len=MAX_PARTS, max_map_len=MAX_FIELDS)
        except Exception as error:  # msgpack raises half a dozen unrelated types on garbage
            raise UpdateError(
                f"the header is not msgpack ({type(error).__name__})", about="msgpack"
            ) from error
        if not isinstance(content, dict):
            raise UpdateError("the header is not a msgpack map", about="header")
        form = content.pop("header_format", None)
        if not _is_count(form):
            raise UpdateError("the header has no format number", about="header_format")
        if form != HEADER_FORMAT:
            who = "the aggregator" if form > HEADER_FORMAT else "the worker"
            raise ForeignHeaderError(
                f"its header has format {form}, the aggregator reads format {HEADER_FORMAT}: upgrade {who}'s FedMoE",
                needs=f"format {form} of headers",
                about="header_format",
            )
        requires = content.get("requires", "")
        if isinstance(requires, str) and (odd := lacking(requires)):
            raise ForeignHeaderError(
                f"its header needs {', '.join(odd)}, which the aggregator does not know: upgrade the FedMoE of the "
                "aggregator",
                needs=", ".join(odd),
                about="requires",
            )
        known = {one.name: one for one in fields(cls) if one.name != "unknown"}
        unknown = {name: value for name, value in content.items() if name not in known}
        content = {
            n: content.get(n, one.default) for n, one in known.items() if n in content or _is_optional(one)
        }
        if missing := sorted(known.keys() - content.keys()):
            raise UpdateError(f"the header lacks the fields {', '.join(missing[:5])}", about=missing[0])
        content["prev"] = _parse_id(content["prev"])
        content["parts"] = _parse_parts(content["parts"])
        content |= _parse_validation(content)
        _check_fields(content)
        if content["vector"] is None:
            content["vector_rows"] = 0
        if len(content) + len(unknown) >= MAX_FIELDS:
            raise UpdateError(
                f"the header has {len(content) + len(unknown)} fields, allowed are {MAX_FIELDS - 1}",
                about="fields",
            )
        header = cls(**content, unknown=msgpack.packb(unknown) if unknown else b"")
        if len(data) > MAX_HEADER_BYTES - SPARE_BYTES and (n_bytes := len(header.pack())) > MAX_HEADER_BYTES:
            raise UpdateError(
                f"the header has {n_bytes} bytes with all its fields, allowed are {MAX_HEADER_BYTES}",
                about="unknown",
            )
        return header


def _is_optional(one: "Field[Any]") -> bool:
    return bool(one.metadata.get("optional"))


def _is_count(value: object) -> bool:
    # bool is an int, and True would pass for 1.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_INT


def _parse_id(value: Any) -> UpdateId | None:
    if value is None:
        return None
    match value:
        case [str() as run, int() as seq] if is_run(run) and _is_count(seq) and seq > 0:
            return UpdateId(run, seq)
    raise UpdateError("the header's prev is not the name of an update", about="prev")


def _parse_parts(value: Any) -> tuple[Part, ...]:
    if not isinstance(value, list):
        raise UpdateError("the header lists no parts", about="parts")
    parts = []
    for item in value:
        match item:
            case [int() as length, bytes() as digest] if _is_count(length) and len(digest) in (
                _QUICK_BYTES,
                _SHA_BYTES,
            ):
                if not 0 < length <= PART_BYTES:
                    raise UpdateError(
                        f"the header names a part of {length} bytes, allowed are {PART_BYTES}", about="length"
                    )
                parts.append(Part(length, digest))
            case _:
                raise UpdateError("the header's list of parts is malformed", about="part")
    return tuple(parts)


def _parse_validation(content: dict[str, Any]) -> dict[str, Any]:
    """The fields of the validation loss, which are for people: whatever is malformed becomes NaN, None or ""."""
    loss, version, rows, rows_set = (content[name] for name in _VALIDATION)
    if loss is not None and not isinstance(loss, float):
        loss = float("nan")
    counts = [value if _is_count(value) and loss is not None else None for value in (version, rows)]
    is_text = isinstance(rows_set, str) and len(rows_set) <= MAX_TEXT_CHARS and loss is not None
    return dict(zip(_VALIDATION, (loss, *counts, rows_set if is_text else ""), strict=True))


def _check_fields(content: dict[str, Any]) -> None:
    for name in (
        "lineage",
        "spec",
        "run",
        "wire_format",
        "base_fingerprint",
        "position",
        "tokenizer",
        "requires",
    ):
        if not isinstance(content[name], str) or len(content[name]) > MAX_TEXT_CHARS:
            raise UpdateError(f"the header's {name} is not a short text", about=name)
    for name in ("seq", "base_version", "n_examples", "n_tokens", "steps", "vector_rows"):
        if not _is_count(content[name]):
            raise UpdateError(f"the header's {name} is not a count", about=name)
    if not isinstance(content["loss"], float):
        raise UpdateError("the header's loss is not a float", about="loss")
    if not isinstance(content["vector"], bytes | None):
        raise UpdateError("the header's vector is not a string of bytes", about="vector")
    if not is_run(content["run"]) or content["seq"] == 0:
        raise UpdateError("the header's run and seq are not the name of an update", about="run")
