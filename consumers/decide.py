"""Decides what becomes of an update: duplicate, undecidable, refused or applied. Pure: state in, verdict out.

    duplicate    it is the worker's last decided update: nothing changes
    undecidable  it has another lineage, does not follow the head, or lacks a part: nothing changes, its worker resends
    refused      it breaks a rule: it becomes the head, with the reason
    applied      it becomes part of the expert, and the head

Redis knows which updates are decided; the worker keeps those that are not. So an undecidable update changes no head.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from fedmoe.protocol.balance import Peers
from fedmoe.protocol.codec import part_count
from fedmoe.protocol.formats import FORMATS, FRAME_BYTES
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.layout import FLOAT_BYTES
from fedmoe.protocol.records import Decided, Meta
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.protocol.server import ServerStep, ends_round, has_state
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.staleness import staleness_of
from fedmoe.protocol.update import Header

# The most steps that one update counts for: 80 minutes of training at 2 steps per second, as after a long outage.
COUNTED_STEPS = 10_000


class Outcome(Enum):
    """How an update was decided."""

    DUPLICATE = "duplicate"
    UNDECIDABLE = "undecidable"
    REFUSED = "refused"
    APPLIED = "applied"


@dataclass(frozen=True, slots=True)
class Verdict:
    """An outcome with its reason (for people); for an applied update, also what its line of the log says of it."""

    outcome: Outcome
    reason: str = ""
    staleness: int = 0
    factor: float = 0.0
    norm: float = 0.0
    weight: float = 1.0
    ends_round: bool = False
    new_state: bool = False


@dataclass(frozen=True, slots=True)
class Admission:
    """A header that breaks no rule: its payload is read next, up to the bound `max_norm`.

    Args:
        staleness: of the update.
        step: how it is folded.
        weight: of its worker beside the others.
    """

    staleness: int
    step: ServerStep
    weight: float = 1.0

    @property
    def max_norm(self) -> float:
        """The largest L2 norm that its payload may have."""
        return self.step.rules.max_norm


class Counts(NamedTuple):
    """Rows and label tokens that an applied update adds to the expert's totals; the rows may be its gateway weight."""

    n_examples: int
    n_tokens: int


def counts_of(header: Header, training: TrainingSettings) -> Counts:
    """The counts that the header claims, bounded by COUNTED_STEPS steps of the rules' batch size.

    A worker may claim any number. The bound depends only on the rules, so a replay gives the same counts.
    """
    most = COUNTED_STEPS * training.batch_size * training.accumulate
    return Counts(min(header.n_examples, most), min(header.n_tokens, most * training.max_length))


def judge_header(
    header: Header, head: Decided | None, meta: Meta, spec: Spec, peers: Peers
) -> Verdict | Admission:
    """Judge a header under the rules in force: a verdict, or the admission of its payload.

    The payload is read only after an admission: a too large update is never fetched.
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
    bound = rules.staleness_bound(peers.known)
    if (
        reason := _breach(header, meta, spec)
        or meta.rolled_back.reason(header.base_version)
        or _too_far(header, staleness, meta, bound)
    ):
        return Verdict(Outcome.REFUSED, reason, staleness)
    is_last = has_state(rules) and ends_round(meta.version, meta.round_version, peers.active)
    step = ServerStep(rules, rules.factor(staleness, peers.weight), is_last)
    return Admission(staleness, step, peers.weight)


def _breach(header: Header, meta: Meta, spec: Spec) -> str:
    """The rule that the header breaks, as a sentence, or ""."""
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
    """Why the update's base is too far from the expert's version, as a sentence, or ""."""
    if staleness > bound:
        return (
            f"too stale: {staleness} updates were applied since the version it started from, at most {bound} are "
            "allowed (max_staleness); its worker goes on from the newest version"
        )
    # After a failover to an older replica, a resent update may be ahead of the expert; its sender keeps it within this
    # bound.
    if header.base_version - meta.version > bound:
        return (
            f"it started from version {header.base_version}, but the expert is at version {meta.version}, and at most "
            f"{bound} versions ahead are allowed: restart the worker"
        )
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """The findings about a payload: not whole, malformed (each with the reason), or its norm.

    Args:
        not_whole: which part is missing or damaged.
        malformed: which part does not match the format and the layout.
        norm: L2 norm; not finite if a value is not.
        largest: the tensor that it changes most, or with a value that is not finite; "" if the norm is admitted.
    """

    not_whole: str = ""
    malformed: str = ""
    norm: float = 0.0
    largest: str = ""


def judge_payload(admission: Admission, payload: Payload) -> Verdict:
    """Judge the payload of an admitted update."""
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
    step = admission.step
    return Verdict(
        Outcome.APPLIED, "", admission.staleness, step.factor, norm, admission.weight, step.ends_round
    )
