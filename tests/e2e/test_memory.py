"""The aggregator's memory: at most 4 × the sum of its experts' fp32 adapters, and 130 MiB.

On top of what it takes to load torch: that is 220 MiB on one machine and more on another, as its kernel counts.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from tests.federation import ScriptedWorker
from tests.processes import environment, eventually, running, terminate

MIB = 2**20
# The shape of SmolLM2-135M; an adapter of rank 8 on all linear layers has 9.3 MiB.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "tie_word_embeddings": True,
}  # fmt: skip


PEAK = "import re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"


def started_mib() -> float:
    """The peak of a process that has loaded what the aggregator loads, and done nothing with it."""
    code = f"import torch, consumers.aggregator, consumers.create; torch.ones(9).add_(1); {PEAK}"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, check=True)
    return int(done.stdout) / 1024


@pytest.mark.timeout(300)
def test_memory_is_bounded_by_the_experts(
    tmp_path: Path, redis_url: str, connect: Callable[[], Connection]
) -> None:
    """Three experts, each pushed to and merged several times: the peak stays below the bound."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    names = ("a", "b", "c")
    experts = [argument for name in names for argument in ("--expert", name)]
    with running(
        tmp_path / "log", "aggregator", "run", "--redis", redis_url, *experts, "--base-model", str(tmp_path),
        "--rank", "8", "--gateway-interval", "0.2",
    ) as aggregator:  # fmt: skip
        store = GatewayStore(connect())
        eventually("the experts", lambda: store.meta("c"), timeout_s=120)
        spec = store.spec("a")
        workers = {
            (name, n): ScriptedWorker(connect(), spec, f"w{n}", name, fingerprint="f")
            for name in names
            for n in range(2)
        }
        for version in range(1, 6):
            for worker in workers.values():
                worker.push(1e-4 * torch.ones(spec.layout.numel))
            for name in names:
                eventually(
                    f"version {version * 2} of {name}",
                    lambda n=name, v=version: store.meta(n).version == v * 2,
                )
            for worker in workers.values():
                worker.pull()
        eventually("a gateway", lambda: store.merged().experts["a"].version == 10)
        status = Path(f"/proc/{aggregator.pid}/status").read_text()
        peak_mib = int(status.split("VmHWM:")[1].split()[0]) / 1024
        assert terminate(aggregator) == 0
    adapters_mib = len(names) * spec.layout.numel * 4 / MIB
    bound_mib = 4 * adapters_mib + 130 + started_mib()
    print(f"peak {peak_mib:.0f} MiB, adapters {adapters_mib:.1f} MiB, bound {bound_mib:.0f} MiB")
    assert peak_mib <= bound_mib
