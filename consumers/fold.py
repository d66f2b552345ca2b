"""The one step that changes an expert: an update moves the weights and the server state. Pure.

Updates are folded one after the other in stream order, and each value independently: neither batching updates nor
folding them part by part changes a bit of the result.
"""

from typing import NamedTuple

import torch

from fedmoe.protocol.rules import NESTEROV, SGD
from fedmoe.protocol.server import ServerStep


class Values(NamedTuple):
    """Weights and server state, (n,) fp32 each; the server state is not read or written under `sgd`."""

    weights: torch.Tensor
    state: torch.Tensor

    def at(self, place: slice) -> "Values":
        """A view of some of the values."""
        return Values(self.weights[place], self.state[place])


def fold(now: Values, delta: torch.Tensor, step: ServerStep, *, out: Values | None = None) -> None:
    """Write the values after the step of `delta` (n,) fp32 to `out` (default: `now` itself).

    Sources: see `fedmoe.protocol.server`; for sgd FedBuff, arXiv 2106.06639, with a buffer of one.
    """
    out, rules = out or now, step.rules
    if rules.server_optimizer == SGD:
        torch.add(now.weights, delta, alpha=step.factor, out=out.weights)
    elif rules.server_optimizer == NESTEROV:
        torch.add(now.weights, delta, alpha=step.factor, out=out.weights)
        torch.add(now.state, delta, alpha=step.factor, out=out.state)
        if step.ends_round:
            out.state.mul_(rules.server_momentum)
            out.weights.add_(out.state)
    else:
        torch.mul(now.state, rules.server_beta2, out=out.state)
        out.state.addcmul_(delta, delta, value=1 - rules.server_beta2)
        torch.addcdiv(
            now.weights,
            delta,
            out.state.sqrt().add_(rules.server_epsilon),
            value=step.factor,
            out=out.weights,
        )
