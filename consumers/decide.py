"""What becomes of an update: duplicate, undecidable, refused or applied. Pure: state in, verdict out.

    duplicate    its (run, seq) is the worker's last decided update: changes nothing
    undecidable  not this lineage, not the head's successor, or not whole: changes nothing, its worker sends it again
    refused      breaks a rule: becomes the head, with the reason
    applied      becomes part of the expert and the head

Redis is the truth about what is decided, the worker about what is not. So what cannot be decided decides nothing.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch

from consumers.fold import fold
from fedmoe.errors import UpdateError
from fedmoe.protocol.codec import FORMATS, FRAME_BYTES, decoded, part_count
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.layout import FLOAT_BYTES
from fedmoe.protocol.records import Decided, Meta
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.staleness import staleness_of
from fedmoe.protocol.update import Header, Part

# Steps that one update counts for at most: 80 minutes of training at 2 steps a second, as after a long outage.
COUNTED_STEPS = 10_000


class Outcome(Enum):
    """How an update was decided."""

    DUPLICATE = "duplicate"
    UNDECIDABLE = "undecidable"
    REFUSED = "refused"
    APPLIED = "applied"


@dataclass(frozen=True, slots=True)
class Verdict:
    """An outcome, with its reason (for people), and for an applied update its staleness, factor and norm."""

    outcome: Outcome
    reason: str = ""
    staleness: int = 0
    factor: float = 0.0
    norm: float = 0.0


@dataclass(frozen=True, slots=True)
class Admission:
    """What a header says that nothing is wrong with, and what its payload, which comes next, must not exceed.

    Args:
        staleness, factor: of the update.
        max_norm: the largest Euclidean norm that its payload may have.
    """

    staleness: int = 0
    factor: float = 1.0
    max_norm: float = math.inf


class Counts(NamedTuple):
    """Rows and label tokens that an applied update counts for, in the expert's totals and in the gateway's weights."""

    n_examples: int
    n_tokens: int


def counts_of(header: Header, training: TrainingSettings) -> Counts:
    """What the header claims, but no more than COUNTED_STEPS steps of the rules' batch can hold.

    A worker may claim any number. The bound uses nothing else that it claims, so a replay counts alike.
    """
    most = COUNTED_STEPS * training.batch_size * training.accumulate
    return Counts(min(header.n_examples, most), min(header.n_tokens, most * training.max_length))


def judge_header(
    header: Header, head: Decided | None, meta: Meta, spec: Spec, workers: int
) -> Verdict | Admission:
    """Judge by the header alone, under the rules in force: a verdict, or the admission of its payload.

    `workers` counts those that ever had an update decided (the fields of `decided`).
    Nothing of the payload need be read for the other outcomes: an update that is too large is never fetched.
    """
    if head and header.id == head.id:
        return Verdict(Outcome.DUPLICATE)
    if header.lineage != meta.lineage:
        return Verdict(
            Outcome.UNDECIDABLE, f"trained on lineage {header.lineage}, the expert's is {meta.lineage}"
        )
    if header.prev != (head.id if head else None):
        return Verdict(
            Outcome.UNDECIDABLE,
            f"follows update {header.prev}, the last decided is {head.id if head else None}",
        )
    staleness = staleness_of(meta.version, header.base_version)
    rules = meta.rules.aggregation
    bound = rules.staleness_bound(workers)
    if reason := _breach(header, meta, spec) or _too_far(header, staleness, meta, bound):
        return Verdict(Outcome.REFUSED, reason, staleness)
    return Admission(staleness, rules.lr * rules.decay(staleness), rules.max_norm)


def _breach(header: Header, meta: Meta, spec: Spec) -> str:
    """The rule that the header breaks, as a sentence, or nothing."""
    if header.spec != meta.spec:
        return f"made for spec {header.spec}, the expert's is {meta.spec}: restart the worker"
    identity = BaseIdentity(fingerprint=header.base_fingerprint, tokenizer=header.tokenizer)
    if difference := identity.difference(meta):
        return f"trained with another base model, tokenizer or chat template: {difference}"
    if header.wire_format != spec.wire_format:
        return f"encoded as {header.wire_format!r}, the spec says {spec.wire_format!r}"
    expected = part_count(spec.layout.numel, spec.wire_format)
    if len(header.parts) != expected:
        return f"has {len(header.parts)} parts, the layout gives {expected}"
    largest = min(FORMATS[spec.wire_format].part_bytes, spec.layout.numel * FLOAT_BYTES) + FRAME_BYTES
    if any(part.length > largest for part in header.parts):
        return (
            f"has a part of {max(part.length for part in header.parts)} bytes, at most {largest} are allowed"
        )
    return ""


def _too_far(header: Header, staleness: int, meta: Meta, bound: int) -> str:
    """Why the update's base is too far from the expert's version, as a sentence, or nothing."""
    if staleness > bound:
        return (
            f"too stale: {staleness} updates were applied since the version it started from, at most {bound} are "
            "allowed (max_staleness); its worker goes on from the newest version"
        )
    # After a failover to an older replica an update that is sent again is rightly ahead, but its sender sees to it that
    # it is so by no more than this.
    if header.base_version - meta.version > bound:
        return (
            f"it started from version {header.base_version}, but the expert is at version {meta.version}, and at most "
            f"{bound} versions ahead are allowed: restart the worker"
        )
    return ""


class _NotWholeError(Exception):
    """A part is not the one that its header names."""


def _whole(announced: Sequence[Part], parts: Iterable[bytes]) -> Iterator[bytes]:
    for index, (part, data) in enumerate(zip(announced, parts, strict=True)):
        if not part.matches(data):
            raise _NotWholeError(f"part {index} of {len(announced)} {'is damaged' if data else 'is missing'}")
        yield data


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory in which an update is folded from `weights` into `out`, (numel,) fp32; for `scratch` see codec.decoded."""

    weights: torch.Tensor
    out: torch.Tensor
    scratch: torch.Tensor


def judge_payload(
    header: Header, admission: Admission, parts: Iterable[bytes], spec: Spec, space: Workspace
) -> Verdict:
    """Check and fold the parts of an update whose header passed, each as it comes: out = weights + factor × Δ.

    Unless the verdict is APPLIED, what is in `out` means nothing.
    """
    squares = 0.0
    try:
        for first, values in decoded(
            _whole(header.parts, parts), spec.wire_format, len(space.weights), space.scratch
        ):
            squares += _norm(values) ** 2
            here = slice(first, first + len(values))
            fold(space.weights[here], values, admission.factor, out=space.out[here])
    except _NotWholeError as error:
        return Verdict(Outcome.UNDECIDABLE, str(error))
    except UpdateError as error:
        return Verdict(Outcome.REFUSED, str(error), admission.staleness)
    norm = math.sqrt(squares)
    if not math.isfinite(norm):
        reason = (
            f"holds NaN or infinity, first in tensor {_largest(spec, space)!r}: check that worker's loss, data and "
            "--precision"
        )
        return Verdict(Outcome.REFUSED, reason, admission.staleness)
    if norm > admission.max_norm:
        reason = (
            f"its norm {norm:.4g} is above max_norm {admission.max_norm:.4g}, largest in tensor "
            f"{_largest(spec, space)!r}: check that worker's data, or raise the bound (fedmoe expert set --max-norm)"
        )
        return Verdict(Outcome.REFUSED, reason, admission.staleness)
    return Verdict(Outcome.APPLIED, "", admission.staleness, admission.factor, norm)


def _norm(values: torch.Tensor) -> float:
    """The Euclidean norm of fp32 values; infinite or NaN only if a value is, though fp32 cannot hold that of 1e30."""
    norm = float(torch.linalg.vector_norm(values))
    return norm if math.isfinite(norm) else float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _largest(spec: Spec, space: Workspace) -> str:
    """The tensor that an update changed most: the first one with a value that is not finite, if there is one.

    By what was folded, because the parts are gone. Only for a refusal: asking this of every update costs too much.
    """
    before, after = spec.layout.views(space.weights), spec.layout.views(space.out)
    norms = {name: _norm(after[name] - before[name]) for name in after}
    odd = [name for name, norm in norms.items() if not math.isfinite(norm)]
    return odd[0] if odd else max(norms, key=norms.__getitem__)
