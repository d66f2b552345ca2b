"""The fold of awkward inputs, for a process of its own: `python -m tests.folded` prints capability and digests."""

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import torch

from fedmoe.protocol.codec import encode, frames, scratch_values
from fedmoe.protocol.fold import Values, fold, fold_frame
from fedmoe.protocol.formats import FORMATS, compiled
from fedmoe.protocol.rules import NESTEROV, SERVER_OPTIMIZERS, SGD, AggregationRules
from fedmoe.protocol.server import ServerStep

Array = np.ndarray[tuple[int], np.dtype[np.float32]]
LENGTHS = (1, 2, 3, 7, 8, 9, 15, 17, 31, 33, 63, 65, 127, 1001, 70_001)
TINIEST, LARGEST = 1e-45, 3.4e38


def steps() -> list[ServerStep]:
    """Steps of every server optimizer; no coefficient is a power of two."""
    return [
        ServerStep(AggregationRules(server_optimizer=optimizer, server_momentum=0.7), factor, factor > 0.1)
        for optimizer in SERVER_OPTIMIZERS
        for factor in (0.3, 1 / 3, 1e-3)
    ]


def inputs(numel: int) -> tuple[Values, torch.Tensor]:
    """Weights, server state and Δ: ordinary values, between them zeros, the smallest and the largest.

    They are numpy's, because torch's normal distribution depends on the processor.
    """
    chance = np.random.default_rng(numel)
    weights, state, delta = (
        torch.from_numpy(chance.standard_normal(numel, dtype=np.float32)) for _ in range(3)
    )
    odd = torch.tensor([0.0, -0.0, TINIEST, -TINIEST, 1e-39, LARGEST, 1.0])
    for tensor in (weights, delta):
        tensor[::5] = odd.repeat(numel)[: len(tensor[::5])]
    return Values(weights, state.abs()), delta


def folded(numel: int, step: ServerStep) -> Values:
    """The values after the step, in buffers of their own."""
    now, delta = inputs(numel)
    out = Values(torch.empty(numel), torch.zeros(numel))
    fold(now, delta, step, out=out)
    return out


def by_numpy(numel: int, step: ServerStep) -> tuple[Array, Array]:
    """Weights and state by the formulas of `fedmoe.protocol.fold`, one numpy operation after the other."""
    now, change = inputs(numel)
    weights, state, delta = now.weights.numpy(), now.state.numpy(), change.numpy()
    rules, move = step.rules, delta * np.float32(step.factor)
    if rules.server_optimizer == SGD:
        return weights + move, np.zeros_like(state)
    if rules.server_optimizer == NESTEROV:
        weights, state = weights + move, state + move
        if step.ends_round:
            state = state * np.float32(rules.server_momentum)
            weights = weights + state
        return weights, state
    state = state * np.float32(rules.server_beta2) + delta * delta * np.float32(1 - rules.server_beta2)
    return weights + move / (np.sqrt(state) + np.float32(rules.server_epsilon)), state


def digest() -> str:
    """SHA-256 of all results."""
    total = hashlib.sha256()
    for step in steps():
        for numel in LENGTHS:
            for tensor in folded(numel, step):
                total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def parts_digest() -> str:
    """SHA-256 of updates as they travel, and of what an aggregator folds from them: by the kernels if they are here."""
    total = hashlib.sha256()
    for wire_format in FORMATS:
        for numel in LENGTHS:
            for result in _travelled(wire_format, numel):
                total.update(result)
    return total.hexdigest()


def _travelled(wire_format: str, numel: int) -> Iterator[bytes]:
    now, delta = inputs(numel)
    delta[delta.abs() > 1.0] = 1.0  # the largest value would leave nothing but zeros in its block
    parts = list(encode(delta, wire_format, minus=now.state))
    yield from parts
    for step in steps():
        out = Values(torch.empty(numel), torch.zeros(numel))
        scratch = torch.empty(scratch_values(numel))
        for frame in frames(parts, wire_format, numel):
            fold_frame(frame, now, step, out, scratch)
        yield from (tensor.numpy().tobytes() for tensor in out)


def report() -> dict[str, object]:
    """What must be the same with every capability, and the capability."""
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "digest": digest(),
        "parts": parts_digest(),
        "kernels": compiled() is not None,
    }


if __name__ == "__main__":
    print(json.dumps(report()))
