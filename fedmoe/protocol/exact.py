"""An expert's exact weights and server state: the snapshot, then the updates of the tail folded in order. Pure.

Everybody who needs them gets them here: load, standby, backup, verify, the builder of the merged gateway, export, and
workers who cannot use the packed weights. They all get the same bits, and `meta` holds their digests.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedmoe.errors import SpecError, UpdateError
from fedmoe.protocol.codec import frames, scratch_values
from fedmoe.protocol.condition import Condition, examine
from fedmoe.protocol.fold import Values, fold_frame
from fedmoe.protocol.integrity import server_state_misfit, server_state_problem
from fedmoe.protocol.layout import AdapterBuffer, check_file
from fedmoe.protocol.records import Meta
from fedmoe.protocol.server import first_value, has_state
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.tail import CopiedParts, TailRecord, no_copies, quick_digest, tail_parts, tail_records
from fedmoe.protocol.weights_parts import values_bytes

Update = tuple[TailRecord, Iterable[bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """The exact values of an expert, as safetensors files that bear its weights commit.

    Args:
        weights: the file.
        server_state: what the server optimizer remembers; None if there is none that belongs to the weights.
        problem: why there is no server state although meta names one, as a clause; "" otherwise.
    """

    weights: bytes
    server_state: bytes | None = None
    problem: str = ""


def fold_updates(values: Values, updates: Iterable[Update], spec: Spec) -> None:
    """Fold updates into weights and server state, (numel,) fp32 each, in place, in order.

    Folding n updates, and then more onto the result, gives the same bits as folding all at once. Parts are taken as
    they are needed, so that only a few are in memory.

    Raises:
        UpdateError: if a part does not match the spec's format and layout.
    """
    numel = spec.layout.numel
    scratch = torch.empty_like(values.weights[: scratch_values(numel)])
    for record, parts in updates:
        step = record.step
        if record.new_state and has_state(step.rules):
            values.state.fill_(first_value(step.rules))
        for frame in frames(parts, spec.wire_format, numel):
            fold_frame(frame, values, step, values, scratch)


def exact_values(
    meta: Meta,
    spec: Spec,
    *,
    weights: bytes,
    server_state: bytes | None,
    tail: Mapping[bytes, bytes],
    copies: CopiedParts = no_copies,
) -> Exact:
    """The exact values of an expert.

    `weights` and `server_state` are the snapshot's files (None if there is no server state), `tail` is the hash, and
    `copies` reads the copied parts that its records name. What the hash holds does not matter if meta names no tail.

    Raises:
        SpecError: if the tail is not whole, does not follow the snapshot, or gives other values than meta's digests
            tell; its text is the end of a sentence.
        UpdateError: if a part of the tail does not match the spec's format and layout.
        ProtocolError: if the tail needs a feature that this FedMoE does not know.
    """
    check_file(spec.layout, len(weights), weights[: len(spec.layout.header)])
    records = tail_records(meta.tail, meta.version, tail) if meta.tail else []
    problem = _state_problem(meta, server_state, len(weights), records)
    state = server_state if meta.server_state and not problem else None
    if records:
        updates = ((record, tail_parts(record, tail, copies)) for record in records)
        goes_on = server_state if _goes_on(records) else None
        weights, state = _folded(meta, spec, weights, goes_on, updates)
    found = digests_of(meta.weights_commit, weights, state)
    expected = meta.digests if state is not None else " ".join(meta.digests.split()[:2])
    if expected.startswith(f"{meta.weights_commit} ") and found != expected:
        raise SpecError(
            f"its weights have digests {found}, but its meta expects {expected}", about="weights_digest"
        )
    return Exact(weights=weights, server_state=state, problem=problem)


def complete(
    spec: bytes | None,
    meta: Mapping[bytes, bytes],
    decided: Mapping[bytes, bytes],
    *,
    weights: bytes | None,
    server_state: bytes | None,
    tail: Mapping[bytes, bytes] | None,
    copies: CopiedParts = no_copies,
    last_line: Sequence[tuple[bytes, Mapping[bytes, bytes]]] = (),
) -> tuple[Condition, Exact | None]:
    """Parse and compare all parts of an expert as Redis holds them; its exact values if it is whole.

    Raises:
        ProtocolError: if a later FedMoE wrote the expert; its parts then cannot be judged.
    """
    found = examine(spec, weights, meta, decided, last_line=last_line)
    if found.damage or found.meta is None or found.spec is None or weights is None:
        return found, None
    exact, wrong = exact_or_damage(
        found.meta, found.spec, weights=weights, server_state=server_state, tail=tail or {}, copies=copies
    )
    return replace(found, damage=wrong), exact


def exact_or_damage(meta: Meta, spec: Spec, **parts: Any) -> tuple[Exact | None, str]:
    """`exact_values` of these parts, or None and what is damaged, as the end of a sentence; raises ProtocolError."""
    try:
        return exact_values(meta, spec, **parts), ""
    except UpdateError as error:
        return None, f"its tail cannot be folded ({error})"
    except SpecError as error:
        if type(error) is not SpecError:
            raise
        return None, str(error)


def digests_of(
    weights_commit: str, weights: bytes | memoryview, server_state: bytes | memoryview | None
) -> str:
    """The digests that meta holds: of the values in these files, whatever their stamps, and the commit they are of.

    Meta names the commit because an aggregator of an earlier release leaves the field as it was.
    """
    files = (weights,) if server_state is None else (weights, server_state)
    return " ".join((weights_commit, *(quick_digest(values_bytes(file)) for file in files)))


def _state_problem(meta: Meta, state: bytes | None, length: int, records: Sequence[TailRecord]) -> str:
    """Why the server state cannot be used, as a clause, "" if it can, or is not needed.

    Raises:
        SpecError: if the weights cannot be told without it, because an update of the tail goes on from it.
    """
    if not records:
        return server_state_problem(meta, state, length)
    if not _goes_on(records):
        return ""  # the tail began another one, or none is left
    if problem := server_state_misfit(meta, state, length):
        raise SpecError(f"{problem}, and its tail goes on from it", about="server_state")
    return ""


def _goes_on(records: Sequence[TailRecord]) -> bool:
    """True if these updates need the server state before them."""
    first = next((record for record in records if has_state(record.step.rules)), None)
    return first is not None and not first.new_state


def _folded(
    meta: Meta, spec: Spec, weights: bytes, state: bytes | None, updates: Iterable[Update]
) -> tuple[bytes, bytes | None]:
    now, remembered = AdapterBuffer(spec.layout), AdapterBuffer(spec.layout)
    now.load(weights)
    if state is not None:
        remembered.load(state)
    fold_updates(Values(now.flat, remembered.flat), updates, spec)
    for buffer in (now, remembered):
        buffer.stamp(meta.weights_commit)
    return bytes(now.file), bytes(remembered.file) if meta.server_state else None
