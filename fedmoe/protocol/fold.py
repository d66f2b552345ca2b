"""The one step that changes an expert: an update moves the weights and the server state. Pure.

Updates are folded one after the other in stream order, and each value independently: neither batching updates nor
folding them part by part changes a bit of the result.

The rounding is part of the protocol: all readers that fold the same updates must get the same bits. Every operation
rounds its result to the nearest fp32, ties to even, before the next operation. No multiplication is fused with an
addition: torch's `add` with `alpha`, `addcmul` and `addcdiv` fuse them on some processors, and there not at the end of
a vector. The root is numpy's, because torch's is not always the nearest fp32. Each coefficient (the factor, β, β₂,
1 − β₂, ε) is computed in fp64 and rounded once to fp32. With w the weight, s the server state, Δ the update's value, f
the factor, and brackets for the order of the operations:

    sgd        w ← w + (f Δ)
    nesterov   w ← w + (f Δ); s ← s + (f Δ); at the end of a round then s ← β s; w ← w + s
    adaptive   s ← (β₂ s) + ((Δ Δ) (1 − β₂)); w ← w + ((f Δ) / (√s + ε))

Sources: see `fedmoe.protocol.server`; for sgd FedBuff, arXiv 2106.06639, with a buffer of one.
"""

from typing import NamedTuple

import numpy as np
import torch

from fedmoe.protocol.codec import Frame
from fedmoe.protocol.formats import squared_norm
from fedmoe.protocol.rules import ADAPTIVE, NESTEROV, SGD
from fedmoe.protocol.server import ServerStep

_AT_ONCE = 512 * 1024  # values, about a part: the intermediate results take at most 2 MiB, or 4 if adaptive


class Values(NamedTuple):
    """Weights and server state, (n,) fp32 each; the server state is not read or written under `sgd`."""

    weights: torch.Tensor
    state: torch.Tensor

    def at(self, place: slice) -> "Values":
        """A view of some of the values."""
        return Values(self.weights[place], self.state[place])


def fold(now: Values, delta: torch.Tensor, step: ServerStep, *, out: Values | None = None) -> None:
    """Write the values after the step of `delta` (n,) fp32 to `out` (default: `now` itself)."""
    out, is_adaptive = out or now, step.rules.server_optimizer == ADAPTIVE
    rows = torch.empty(2 if is_adaptive else 1, min(len(delta), _AT_ONCE), dtype=torch.float32)
    for first in range(0, len(delta), _AT_ONCE):
        here = slice(first, first + _AT_ONCE)
        some = delta[here]
        _fold(now.at(here), some, step, out.at(here), rows[:, : len(some)])


def fold_frame(frame: Frame, now: Values, step: ServerStep, out: Values, scratch: torch.Tensor) -> float:
    """Fold one part of an update: write the values at its place to `out`; returns the part's squared L2 norm.

    `now` and `out` are of the whole adapter, (numel,) each; for `scratch` see `codec.scratch_values`.

    Raises:
        UpdateError: if a scale is not finite; `out` is then undefined at this place.
    """
    if step.rules.server_optimizer == SGD:
        return frame.fold(now.weights, step.factor, out.weights, scratch)
    values = frame.decode(scratch[: frame.here.stop - frame.here.start])
    fold(now.at(frame.here), values, step, out=out.at(frame.here))
    return squared_norm(values)


def _fold(now: Values, delta: torch.Tensor, step: ServerStep, out: Values, rows: torch.Tensor) -> None:
    rules, move = step.rules, torch.mul(delta, step.factor, out=rows[0])
    if rules.server_optimizer == SGD:
        torch.add(now.weights, move, out=out.weights)
    elif rules.server_optimizer == NESTEROV:
        torch.add(now.weights, move, out=out.weights)
        torch.add(now.state, move, out=out.state)
        if step.ends_round:
            out.state.mul_(rules.server_momentum)
            out.weights.add_(out.state)
    else:
        square = torch.mul(delta, delta, out=rows[1]).mul_(1 - rules.server_beta2)
        torch.mul(now.state, rules.server_beta2, out=out.state).add_(square)
        np.sqrt(out.state.numpy(), out=rows[1].numpy())
        torch.add(now.weights, move.div_(rows[1].add_(rules.server_epsilon)), out=out.weights)
