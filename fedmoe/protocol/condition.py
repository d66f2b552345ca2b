"""What is left of an expert in Redis: its parts, parsed and compared. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedmoe.errors import ProtocolError, SpecError
from fedmoe.protocol.integrity import damage
from fedmoe.protocol.layout import stamp_of
from fedmoe.protocol.records import Decided, Meta, read_protocol
from fedmoe.protocol.spec import Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What is left of an expert in Redis.

    Args:
        commit: the head of its history, "" if there is none.
        meta: None if it is missing or malformed.
        damage: what is missing or does not match this meta, as the end of a sentence; "" if the expert is whole.
        weights_commit: the commit that wrote the weights that are there; "" if there are none.
        decided: the last decided update of each worker.
        logged_version: of the log's last line, -1 if there is none.
        last_line: the log's last line; empty if there is none.
        spec: None if it is missing or malformed.
    """

    commit: str
    meta: Meta | None
    damage: str
    weights_commit: str
    decided: Mapping[str, Decided]
    logged_version: int
    last_line: Mapping[bytes, bytes] = field(default_factory=dict)
    spec: Spec | None = None


def examine(
    spec: bytes | None,
    weights: bytes | None,
    meta: Mapping[bytes, bytes],
    decided: Mapping[bytes, bytes],
    *,
    weights_bytes: int | None = None,
    tail_fields: int | None = None,
    last_line: Sequence[tuple[bytes, Mapping[bytes, bytes]]] = (),
) -> Condition:
    """Parse the parts of an expert as Redis holds them, and compare them.

    The first bytes of the weights suffice if `weights_bytes` gives the length of the whole. `tail_fields` is the number
    of fields of the tail, None if `fedmoe.protocol.exact` looks at the tail itself.

    Raises:
        ProtocolError: if a later FedMoE wrote the expert; its parts then cannot be judged.
    """
    read_protocol(meta.get(b"protocol"))
    found = []
    parsed, root, records = None, None, {}
    length = len(weights or b"") if weights_bytes is None else weights_bytes
    try:
        parsed = Spec.from_json(spec) if spec is not None else None
    except ProtocolError:
        raise
    except SpecError as error:
        found.append(f"its spec cannot be read ({error})")
    try:
        records = {worker.decode(): Decided.from_json(text) for worker, text in decided.items()}
    except (SpecError, UnicodeDecodeError) as error:
        found.append(f"its decided updates cannot be read ({error})")
    try:
        root = Meta.from_hash(meta) if meta else None
        if root is None:
            found.append("its meta is missing")
    except ProtocolError:  # an expert that needs an unknown feature is not damaged
        raise
    except SpecError:
        found.append(
            "its meta lacks a field or is malformed (an earlier FedMoE wrote it, or it was edited by hand)"
        )
    if root is not None and not found:
        found.append(damage(root, spec=parsed.digest if parsed else None, weights=weights, decided=records))
    if root is not None and root.parts and 0 < length < root.parts.n_bytes:
        found.append(root.parts.lost)
    elif parsed is not None and length not in (0, parsed.layout.file_bytes):
        found.append(f"its weights have {length} bytes, but its spec expects {parsed.layout.file_bytes}")
    if root is not None and tail_fields is not None and tail_fields < root.tail.fields:
        found.append(f"its tail has {tail_fields} records and parts, but its meta expects {root.tail.fields}")
    return Condition(
        commit=meta.get(b"commit", b"").decode(errors="backslashreplace"),
        meta=root,
        damage="; ".join(filter(None, found)),
        weights_commit=stamp_of(weights) if weights else "",
        decided=records,
        logged_version=version_of(last_line),
        last_line=last_line[-1][1] if last_line else {},
        spec=parsed,
    )


def version_of(lines: Sequence[tuple[bytes, Mapping[bytes, bytes]]] | None) -> int:
    """The version in the last of these log lines, -1 if there is none."""
    try:
        return int(lines[-1][1][b"version"]) if lines else -1
    except (KeyError, ValueError):
        return -1
