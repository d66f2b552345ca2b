"""A race to a loss in real processes: FedMoE beside Flower, the same clients, model, rows and trainer.

Four clients fine-tune SmolLM2-135M-Instruct: one on the rows of python_expert, one on sql_expert, two on docs_expert.
Every step of a client takes as long as its pace says, since the clients share this machine's cores: computing takes
less, and the client sleeps for the rest. In the second race the pace of the last client is four times as slow. FedMoE's
clients train the gateway with the rules of a new one; Flower's are averaged (FedAvg) in rounds of `ROUND_STEPS` steps.

The weights are saved along the way with the second since the training began, and tested afterwards on held-out rows.
Flower starts a process for each message, which loads the model again. Its time is given with and without that.
With a directory to keep them in, each system's losses stay there, and what is there is not run again.
The loss to reach is that of `ops.bench.learning.times`: 80 % of what experts trained apart gain.
"""

import json
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from fedmoe.util.disk import write_whole
from ops.bench.flower import install
from ops.bench.learning.carry import BASE, OWN, outcomes
from ops.bench.learning.lab import Lab
from ops.bench.learning.runs import DOMAINS, Run
from ops.bench.learning.times import PART, reached
from ops.bench.plan import Plan
from ops.bench.race_fedmoe import run_fedmoe
from ops.bench.race_flower import run_flower
from ops.bench.race_seat import Setup, Snapshot, prepare
from ops.bench.result import Result, figure, ratio

CLIENTS = ("python_expert", "sql_expert", "docs_expert", "docs_expert")
RACES = {"alike": (1.0, 1.0, 1.0, 1.0), "straggler": (1.0, 1.0, 1.0, 4.0)}  # times as long as the pace
Points = list[tuple[float, float, float]]


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
            seconds = {}
            for system, play in (("fedmoe", run_fedmoe), ("flower", run_flower)):
                label = f"{name}-{system}"
                file = (keep or Path(scratch)) / f"race-{label}-{race.label}.json"
                if (points := kept_points(file, goal)) is None:
                    directory = Path(scratch, label)
                    prepare(directory, setup, lab.train)
                    points = losses_until(
                        goal, play(directory, setup), lambda flat: _loss(lab, race.rows, flat)
                    )
                    write_whole(file, (json.dumps({"goal": goal, "points": points}) + "\n").encode())
                if (found := reached([point[:2] for point in points], goal)) is None:
                    print(f"    {label}: the loss was not reached within {points[-1][0]:.0f} s", flush=True)
                    continue
                seconds[system] = found
                yield figure(f"race_{name}_{system}_s", [found], "s")
                if system == "flower":
                    spared = reached([(second - starts, loss) for second, loss, starts in points], goal)
                    assert spared is not None
                    seconds["flower_without_starts"] = spared
                    yield figure(f"race_{name}_flower_without_starts_s", [spared], "s")
            for other in sorted(seconds.keys() - {"fedmoe"} if "fedmoe" in seconds else ()):
                yield ratio(
                    f"race_{name}" + other.removeprefix("flower"), [seconds["fedmoe"]], [seconds[other]]
                )


def _loss(lab: Lab, rows: int, flat: torch.Tensor) -> float:
    return statistics.fmean(lab.losses(rows, flat, DOMAINS).values())


def kept_points(file: Path, goal: float) -> Points | None:
    """What `losses_until` found in an earlier race to this loss; None if there was none, or none to this loss."""
    try:
        kept = json.loads(file.read_text())
        points = [(float(second), float(loss), float(starts)) for second, loss, starts in kept["points"]]
        return points if kept["goal"] == goal else None
    except (OSError, ValueError, TypeError, LookupError):
        return None


def losses_until(
    goal: float, snapshots: Iterable[Snapshot], loss_of: Callable[[torch.Tensor], float]
) -> Points:
    """Second, loss and `starts` of each snapshot, in order, up to the first that has the loss."""
    points: Points = []
    for second, flat, starts in snapshots:
        points.append((round(second, 2), loss_of(flat), round(starts, 2)))
        print(f"    after {second:.0f} s: {points[-1][1]:.3f}", flush=True)
        if points[-1][1] <= goal:
            break
    return points
