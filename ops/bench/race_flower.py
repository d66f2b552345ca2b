"""Flower's side of the race: a SuperLink, a SuperNode for each client, FedAvg in rounds.

Its environment sees FedMoE's packages behind its own, so that its clients have the same trainer.
"""

import site
from collections.abc import Generator
from pathlib import Path

from safetensors.torch import load_file, save_file

from fedmoe.protocol.lora_init import initial_weights
from ops.bench.flower import VENV, start_flower
from ops.bench.processes import ROOT, Processes
from ops.bench.race_seat import Setup, Snapshot

APP = Path(__file__).parent / "race_app"
SAVED = "round-*.safetensors"


def run_flower(directory: Path, setup: Setup) -> Generator[Snapshot]:
    """The weights before the first round and after each; a round takes as long as its slowest client."""
    packages = next(VENV.glob("lib/python3*/site-packages"))
    (packages / "behind.pth").write_text("\n".join((str(ROOT), *site.getsitepackages())) + "\n")
    spec = setup.spec()
    first = initial_weights(spec.layout, spec.init_seed)
    save_file({"flat": first}, directory / "first.safetensors")
    longest_s = setup.round_steps * max(setup.step_s) + 120.0
    with Processes("race_flower") as processes:
        start_flower(
            processes, directory / "flower", APP, f'directory="{directory}"', clients=len(setup.domains)
        )
        yield Snapshot(0.0, first)
        for number in range(setup.rounds):
            file = directory / SAVED.replace("*", str(number + 1))
            processes.until(f"round {number + 1}", file.exists, timeout_s=longest_s)
            saved = load_file(file)
            yield Snapshot(float(saved["second"]), saved["flat"], float(saved["starts"]))
