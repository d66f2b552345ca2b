"""fedmoe.protocol.fold: each operation rounds by itself, on every processor and at every place of a vector."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmoe.protocol.server import ServerStep
from tests.folded import LENGTHS, by_numpy, folded, inputs, report, steps

HERE = torch.backends.cpu.get_cpu_capability()
# An x86-64 processor has also those before its own. Elsewhere there is one.
X86 = ["DEFAULT", "AVX2", "AVX512"]
CAPABILITIES = X86[: X86.index(HERE) + 1] if HERE in X86 else [HERE]
pytestmark = pytest.mark.one_server


@pytest.mark.parametrize("step", steps(), ids=lambda step: f"{step.rules.server_optimizer}-{step.factor:.3g}")
def test_each_operation_rounds_by_itself(step: ServerStep) -> None:
    """numpy, which fuses nothing, gives the same bits, NaN and infinity included."""
    for numel in LENGTHS:
        with np.errstate(all="ignore"):
            wanted = by_numpy(numel, step)
        for ours, theirs in zip(folded(numel, step), wanted, strict=True):
            assert ours.numpy().tobytes() == theirs.tobytes(), numel


@pytest.mark.parametrize("step", steps(), ids=lambda step: f"{step.rules.server_optimizer}-{step.factor:.3g}")
def test_the_inputs_show_what_is_fused(step: ServerStep) -> None:
    """Rounding only once gives other bits here: the other tests can fail."""
    now, delta = inputs(1001)
    fused = (now.weights.double() + delta.double() * float(np.float32(step.factor))).float()
    assert not torch.equal(folded(1001, step).weights, fused)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_processor_gives_the_same_bits(capability: str) -> None:
    """Vectors of four, eight and sixteen values, with and without fused operations at hand.

    So do the compiled kernels, which are built for the capability: they are not given up on any.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.folded"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()},
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == report() | {"capability": capability}
