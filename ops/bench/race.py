"""A race to a loss in real processes: FedMoE beside Flower, the same clients, model, rows and trainer.

Four clients fine-tune SmolLM2-135M-Instruct: one on the rows of python_expert, one on sql_expert, two on docs_expert.
Every step of a client takes as long as its pace says, since the clients share this machine's cores: computing takes
less, and the client sleeps for the rest. In the second race the pace of the last client is four times as slow. FedMoE's
clients train the gateway with the rules of a new one; Flower's are averaged (FedAvg) in rounds. Flower races once with
each round length of the plan, and the best counts, separately in each race.

The weights are saved along the way with the second since the training began, and tested on held-out rows: FedMoE's
afterwards, Flower's while it goes on, by a thread of the lowest priority, so that it can end when it has the loss.
Flower starts a process for each message, which loads the model again. Its time is given with and without that.
With a directory to keep them in, each system's losses stay there, and what is there is not run again.
The loss to reach is that of `ops.bench.learning.times`: 80 % of what experts trained apart gain.
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from ops.bench.flower import install
from ops.bench.learning.carry import BASE, OWN, outcomes
from ops.bench.learning.lab import Lab, Rows
from ops.bench.learning.runs import DOMAINS, Run
from ops.bench.learning.times import PART, reached
from ops.bench.plan import Plan
from ops.bench.race_fedmoe import run_fedmoe
from ops.bench.race_flower import run_flower
from ops.bench.race_kept import Curve, Points, read, write
from ops.bench.race_seat import Setup, Snapshot, prepare
from ops.bench.result import Result, figure, ratio

CLIENTS = ("python_expert", "sql_expert", "docs_expert", "docs_expert")
RACES = {"alike": (1.0, 1.0, 1.0, 1.0), "straggler": (1.0, 1.0, 1.0, 4.0)}  # times as long as the pace
System = Callable[[Path, Setup], Generator[Snapshot]]


class Arrival(NamedTuple):
    """Seconds until a contestant had the loss; `spared` without the time in which all waited for processes to start."""

    seconds: float
    spared: float


def run(plan: Plan) -> Iterator[Result]:
    """Both races, and what each system needs for the loss."""
    install()
    race = plan.race
    keep = plan.learning.keep
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedmoe-race-"))
        apart = Run(scheme="apart", merges=False, steps=race.apart_steps, rows=race.rows)
        [(_, outcome)] = outcomes([apart], keep or Path(scratch, "keep"))
        base, own = (statistics.fmean(outcome.losses[model].values()) for model in (BASE, OWN))
        goal = base - PART * (base - own)
        yield figure("race_loss_to_reach", [goal], "nats/token")
        lab = Lab(apart.rank)

        judge = stack.enter_context(ThreadPoolExecutor(1, initializer=_give_way))

        def loss_of(flat: torch.Tensor) -> float:
            return statistics.fmean(judge.submit(lab.losses, race.rows, flat, DOMAINS).result().values())

        course = Course(goal, lab.train, loss_of, keep or Path(scratch), Path(scratch), race.label)
        for name, slower in RACES.items():
            setup = Setup(
                model_dir=lab.model_dir,
                domains=CLIENTS,
                pad_id=lab.pad_id,
                step_s=tuple(race.step_s * factor for factor in slower),
                steps=race.steps,
                sync_s=race.sync_s,
                round_steps=race.steps,
            )
            ours = course.arrival(name, f"FedMoE, every {race.sync_s:g} s", run_fedmoe, setup)
            theirs = {
                steps: course.arrival(
                    name, f"Flower, rounds of {steps}", run_flower, replace(setup, round_steps=steps)
                )
                for steps in race.round_steps
            }
            yield from race_figures(name, ours, theirs)


def _give_way() -> None:
    """Let the calling thread, which measures losses, leave the cores to the clients of a race that goes on."""
    os.nice(19)
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class Course:
    """What the contestants of all races share.

    Args:
        goal: loss to reach.
        rows: training rows of each domain.
        loss_of: the held-out loss of an adapter (numel,).
        keep, scratch: directories of what is kept, and of the running race.
        label: of the plan.
    """

    goal: float
    rows: Rows
    loss_of: Callable[[torch.Tensor], float]
    keep: Path
    scratch: Path
    label: str

    def arrival(self, race: str, who: str, system: System, setup: Setup) -> Arrival | None:
        """When one contestant has the loss, from its file if it ran before; None if never."""
        empty = Curve(race, who, self.goal, [])
        file = self.keep / empty.file_name(self.label)
        curve = read(file)
        if curve is None or replace(curve, points=[]) != empty:
            directory = self.scratch / file.stem
            prepare(directory, setup, self.rows)
            with closing(system(directory, setup)) as snapshots:
                curve = replace(empty, points=losses_until(self.goal, snapshots, self.loss_of))
            write(file, curve)
        if (found := arrival_of(curve)) is None:
            last = curve.points[-1][0]
            print(f"    {race}, {who}: the loss was not reached within {last:.0f} s", flush=True)
        return found


def arrival_of(curve: Curve) -> Arrival | None:
    """When a curve comes down to its loss; None if it never does."""
    seconds = reached([(second, loss) for second, loss, _ in curve.points], curve.goal)
    spared = reached([(second - starts, loss) for second, loss, starts in curve.points], curve.goal)
    return None if seconds is None or spared is None else Arrival(seconds, spared)


def race_figures(name: str, ours: Arrival | None, theirs: Mapping[int, Arrival | None]) -> Iterator[Result]:
    """The seconds of each contestant in a race, and FedMoE's ÷ those of Flower's best round length.

    Args:
        name: of the race.
        ours: None if FedMoE did not reach the loss.
        theirs: length of a round in steps → arrival; with and without starts, another length may be the best.
    """
    if ours is not None:
        yield figure(f"race_{name}_fedmoe_s", [ours.seconds], "s")
    arrived = {steps: one for steps, one in theirs.items() if one is not None}
    for steps, one in arrived.items():
        yield figure(f"race_{name}_flower_{steps}_steps_s", [one.seconds], "s")
    if not arrived:
        return
    best = Arrival(*(min(seconds) for seconds in zip(*arrived.values(), strict=True)))
    yield figure(f"race_{name}_flower_s", [best.seconds], "s")
    yield figure(f"race_{name}_flower_without_starts_s", [best.spared], "s")
    if ours is not None:
        yield ratio(f"race_{name}", [ours.seconds], [best.seconds])
        yield ratio(f"race_{name}_without_starts", [ours.seconds], [best.spared])


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
