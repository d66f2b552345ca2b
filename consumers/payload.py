"""The payload of an admitted update: checks, decodes and folds its parts as they arrive.

A payload is folded before it is judged, because its parts are not held in memory; if it is not applied, the folded
result is discarded.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from consumers.decide import Admission, Payload, Verdict, judge_payload
from fedmoe.errors import UpdateError
from fedmoe.protocol.codec import decoded
from fedmoe.protocol.fold import Values, fold
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Header, Part


@dataclass(frozen=True, slots=True)
class Workspace:
    """Buffers to fold an update from `now` into `out`, (numel,) fp32 each; for `scratch` see codec.decoded."""

    now: Values
    out: Values
    scratch: torch.Tensor


def fold_payload(
    header: Header, admission: Admission, parts: Iterable[bytes], spec: Spec, space: Workspace
) -> Verdict:
    """Fold an update and judge it.

    Unless the verdict is APPLIED, the content of `out` is undefined.
    """
    return judge_payload(admission, _fold(header, admission, parts, spec, space))


def _fold(
    header: Header, admission: Admission, parts: Iterable[bytes], spec: Spec, space: Workspace
) -> Payload:
    squares = 0.0
    try:
        for first, values in decoded(
            _whole(header.parts, parts), spec.wire_format, len(space.now.weights), space.scratch
        ):
            squares += _norm(values) ** 2
            here = slice(first, first + len(values))
            fold(space.now.at(here), values, admission.step, out=space.out.at(here))
    except _NotWholeError as error:
        return Payload(not_whole=str(error))
    except UpdateError as error:
        return Payload(malformed=str(error))
    norm = math.sqrt(squares)
    return Payload(norm=norm, largest="" if norm <= admission.max_norm else _largest(spec, space))


class _NotWholeError(Exception):
    """A part is missing or does not match the header's length and digest."""


def _whole(announced: Sequence[Part], parts: Iterable[bytes]) -> Iterator[bytes]:
    for index, (part, data) in enumerate(zip(announced, parts, strict=True)):
        if not part.matches(data):
            raise _NotWholeError(f"part {index} of {len(announced)} {'is damaged' if data else 'is missing'}")
        yield data


def _norm(values: torch.Tensor) -> float:
    """L2 norm of fp32 values; infinite or NaN only if a value is: if fp32 overflows, it is computed in fp64."""
    norm = float(torch.linalg.vector_norm(values))
    return norm if math.isfinite(norm) else float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _largest(spec: Spec, space: Workspace) -> str:
    """The first tensor with a value that is not finite, otherwise the tensor that the update changed most.

    It compares the folded result with the weights, because the parts are gone. It is too expensive to run for every
    update, so it runs only for a refusal.
    """
    before, after = spec.layout.views(space.now.weights), spec.layout.views(space.out.weights)
    norms = {name: _norm(after[name] - before[name]) for name in after}
    odd = [name for name, norm in norms.items() if not math.isfinite(norm)]
    return odd[0] if odd else max(norms, key=norms.__getitem__)


def keeping(stream: Iterable[bytes], parts: list[bytes]) -> Iterator[bytes]:
    """The parts of a stream, each added to `parts` as it comes."""
    for part in stream:
        parts.append(part)
        yield part
