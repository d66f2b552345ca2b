"""A race to a loss in real processes: FedMoE beside Flower, the same clients, model, rows and trainer.

Four clients fine-tune SmolLM2-135M-Instruct: one on the rows of python_expert, one on sql_expert, two on docs_expert.
Every step of a client takes as long as its pace says, since the clients share this machine's cores: computing takes
less, and the client sleeps for the rest. In the second race the pace of the last client is four times as slow. FedMoE's
clients train the gateway with the rules of a new one; Flower's are averaged (FedAvg) in rounds of `ROUND_STEPS` steps.

The weights are saved along the way with the second since the training began, and tested afterwards on held-out rows.
The loss to reach is that of `ops.bench.learning.times`: 80 % of what experts trained apart gain.
"""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ops.bench.flower import install
from ops.bench.learning.carry import BASE, OWN, outcomes
from ops.bench.learning.lab import Lab
from ops.bench.learning.runs import DOMAINS, Run
from ops.bench.learning.times import PART, reached
from ops.bench.plan import Plan
from ops.bench.processes import BenchError
from ops.bench.race_fedmoe import run_fedmoe
from ops.bench.race_flower import run_flower
from ops.bench.race_seat import Setup, prepare
from ops.bench.result import Result, figure, ratio

CLIENTS = ("python_expert", "sql_expert", "docs_expert", "docs_expert")
RACES = {"alike": (1.0, 1.0, 1.0, 1.0), "straggler": (1.0, 1.0, 1.0, 4.0)}  # times as long as the pace
Snapshots = Sequence[tuple[float, torch.Tensor]]  # second since the training began, weights (numel,) fp32


def run(plan: Plan) -> Iterator[Result]:
    """Both races, and what each system needs for the loss."""
    install()
    race = plan.race
    keep = plan.learning.keep
    with tempfile.TemporaryDirectory(prefix="fedmoe-race-") as scratch:
        apart = Run(scheme="apart", merges=False, steps=race.apart_steps, rows=race.rows)
        [(_, outcome)] = outcomes([apart], keep or Path(scratch, "keep"))
        base, own = (statistics.fmean(outcome.losses[model].values()) for model in (BASE, OWN))
        goal = base - PART * (base - own)
        yield figure("race_loss_to_reach", [goal], "nats/token")
        lab = Lab(apart.rank)
        for name, slower in RACES.items():
            setup = Setup(
                model_dir=lab.model_dir,
                domains=CLIENTS,
                pad_id=lab.pad_id,
                step_s=tuple(race.step_s * factor for factor in slower),
                round_steps=race.round_steps,
                rounds=race.rounds,
            )
            directory = Path(scratch, name)
            prepare(directory, setup, lab.train)
            seconds = {}
            for system, play in (("fedmoe", run_fedmoe), ("flower", run_flower)):
                seconds[system] = _seconds_to(goal, play(directory, setup), lab, race.rows)
                yield figure(f"race_{name}_{system}_s", [seconds[system]], "s")
            yield ratio(f"race_{name}", [seconds["fedmoe"]], [seconds["flower"]])


def _seconds_to(goal: float, snapshots: Snapshots, lab: Lab, rows: int) -> float:
    """When a loss was reached; tests the snapshots in order, until one has it.

    Raises:
        BenchError: if none has it.
    """
    curve: list[tuple[float, float]] = []
    for second, flat in snapshots:
        curve.append((second, statistics.fmean(lab.losses(rows, flat, DOMAINS).values())))
        print(f"    after {second:.0f} s: {curve[-1][1]:.3f}", flush=True)
        if (found := reached(curve, goal)) is not None:
            return found
    raise BenchError(f"the loss {goal:.3f} was not reached: give the race more rounds")
