"""The payload of an admitted update: checks, decodes and folds its parts as they arrive.

A payload is folded before it is judged, because its parts are not held in memory; if it is not applied, the folded
result is discarded.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from consumers.decide import Admission, Payload, Verdict, judge_payload
from fedmoe.errors import UpdateError
from fedmoe.protocol.codec import check_complete, open_part
from fedmoe.protocol.fold import Values, fold_frame
from fedmoe.protocol.formats import squared_norm
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Header
from fedmoe.util.threads import ALONE, Threads

MANY_PARTS = 8  # with fewer, one thread is done before others have begun


@dataclass(frozen=True, slots=True)
class Workspace:
    """Buffers to fold an update from `now` into `out`, (numel,) fp32 each; for `scratch` see codec.scratch_values.

    `threads` fold an update of many parts. Each of them then has its own scratch.
    """

    now: Values
    out: Values
    scratch: torch.Tensor
    threads: Threads = ALONE


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
    numel = len(space.now.weights)

    def folded(index: int, part: bytes) -> float:
        if not header.parts[index].matches(part):
            raise _NotWholeError(
                f"part {index} of {len(header.parts)} {'is damaged' if part else 'is missing'}"
            )
        frame = open_part(part, index, spec.wire_format, numel)
        scratch = space.scratch if threads is ALONE else torch.empty_like(space.scratch)
        return fold_frame(frame, space.now, admission.step, space.out, scratch)

    threads = space.threads if len(header.parts) >= MANY_PARTS else ALONE
    try:
        squares = sum(threads.in_order(folded, parts))
        check_complete(len(header.parts), spec.wire_format, numel)
    except _NotWholeError as error:
        return Payload(not_whole=str(error))
    except UpdateError as error:
        return Payload(malformed=str(error))
    norm = math.sqrt(squares)
    return Payload(norm=norm, largest="" if norm <= admission.max_norm else _largest(spec, space))


class _NotWholeError(Exception):
    """A part is missing or does not match the header's length and digest."""


def _largest(spec: Spec, space: Workspace) -> str:
    """The first tensor with a value that is not finite, otherwise the tensor that the update changed most.

    It compares the folded result with the weights, because the parts are gone. It is too expensive to run for every
    update, so it runs only for a refusal.
    """
    before, after = spec.layout.views(space.now.weights), spec.layout.views(space.out.weights)
    norms = {name: math.sqrt(squared_norm(after[name] - before[name])) for name in after}
    odd = [name for name, norm in norms.items() if not math.isfinite(norm)]
    return odd[0] if odd else max(norms, key=norms.__getitem__)


def keeping(stream: Iterable[bytes], parts: list[bytes]) -> Iterator[bytes]:
    """The parts of a stream, each added to `parts` as it comes."""
    for part in stream:
        parts.append(part)
        yield part
