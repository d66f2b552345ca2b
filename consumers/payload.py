"""The payload of an update whose header passed: check, decode and fold its parts, each as it comes.

It is folded before it is judged, because the parts are not kept; into memory that nobody needs if it is refused.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from consumers.decide import Admission, Payload, Verdict, judge_payload
from consumers.fold import fold
from fedmoe.errors import UpdateError
from fedmoe.protocol.codec import decoded
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Header, Part


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory in which an update is folded from `weights` into `out`, (numel,) fp32; for `scratch` see codec.decoded."""

    weights: torch.Tensor
    out: torch.Tensor
    scratch: torch.Tensor


def fold_payload(
    header: Header, admission: Admission, parts: Iterable[bytes], spec: Spec, space: Workspace
) -> Verdict:
    """Fold an update, out = weights + factor × Δ, and judge it.

    Unless the verdict is APPLIED, what is in `out` means nothing.
    """
    return judge_payload(admission, _fold(header, admission, parts, spec, space))


def _fold(
    header: Header, admission: Admission, parts: Iterable[bytes], spec: Spec, space: Workspace
) -> Payload:
    squares = 0.0
    try:
        for first, values in decoded(
            _whole(header.parts, parts), spec.wire_format, len(space.weights), space.scratch
        ):
            squares += _norm(values) ** 2
            here = slice(first, first + len(values))
            fold(space.weights[here], values, admission.factor, out=space.out[here])
    except _NotWholeError as error:
        return Payload(not_whole=str(error))
    except UpdateError as error:
        return Payload(malformed=str(error))
    norm = math.sqrt(squares)
    return Payload(norm=norm, largest="" if norm <= admission.max_norm else _largest(spec, space))


class _NotWholeError(Exception):
    """A part is not the one that its header names."""


def _whole(announced: Sequence[Part], parts: Iterable[bytes]) -> Iterator[bytes]:
    for index, (part, data) in enumerate(zip(announced, parts, strict=True)):
        if not part.matches(data):
            raise _NotWholeError(f"part {index} of {len(announced)} {'is damaged' if data else 'is missing'}")
        yield data


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
