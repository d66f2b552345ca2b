"""What becomes of an update: duplicate, undecidable, refused or applied. Pure: state in, verdict out.

    duplicate    its (run, seq) is the worker's last decided update: changes nothing
    undecidable  not this lineage, not the head's successor, or not whole: changes nothing, its worker sends it again
    refused      breaks a rule: becomes the head, with the reason
    applied      becomes part of the expert and the head

Redis is the truth about what is decided, the worker about what is not. So what cannot be decided decides nothing.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from fedmoe.protocol.codec import FORMATS, FRAME_BYTES, part_count
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.layout import FLOAT_BYTES
from fedmoe.protocol.records import Decided, Meta
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.staleness import staleness_of
from fedmoe.protocol.update import Header

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
    if difference := BaseIdentity.from_header(header).difference(meta):
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """What a payload turned out to be: not whole, malformed (each with the reason), or of this norm.

    Args:
        not_whole: which part is missing or damaged.
        malformed: which part is not what the format and the layout call for.
        norm: Euclidean; not finite if a value is not.
        largest: the tensor that it changes most, or with a value that is not finite; "" if the norm is admitted.
    """

    not_whole: str = ""
    malformed: str = ""
    norm: float = 0.0
    largest: str = ""


def judge_payload(admission: Admission, payload: Payload) -> Verdict:
    """Judge an update whose header passed by what its payload is."""
    if payload.not_whole:
        return Verdict(Outcome.UNDECIDABLE, payload.not_whole)
    norm, reason = payload.norm, payload.malformed
    if not reason and not math.isfinite(norm):
        reason = (
            f"holds NaN or infinity, first in tensor {payload.largest!r}: check that worker's loss, data and "
            "--precision"
        )
    if not reason and norm > admission.max_norm:
        reason = (
            f"its norm {norm:.4g} is above max_norm {admission.max_norm:.4g}, largest in tensor "
            f"{payload.largest!r}: check that worker's data, or raise the bound (fedmoe expert set --max-norm)"
        )
    if reason:
        return Verdict(Outcome.REFUSED, reason, admission.staleness)
    return Verdict(Outcome.APPLIED, "", admission.staleness, admission.factor, norm)
