"""When the gateway reaches a loss: at the workers' own pace, or in rounds that wait for the slowest worker. Pure.

The loss is that after 80 % of what perfect routing gains in 48 steps: base − 0.8 × (base − own experts). Between two
measurements of a run its loss is interpolated linearly. Seconds are virtual: a step of an ordinary worker takes one.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ops.bench.learning.carry import BASE, OWN, Outcome
from ops.bench.learning.runs import Run
from ops.bench.result import Result, figure

PART = 0.8  # of perfect routing's gain
ALIKE, STRAGGLER = "four", "straggler"
OWN_PACE = "own pace"
Curve = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Traced:
    """How the loss of one run fell: (virtual second, loss) with the loss to reach; the other fields as in Arrival."""

    workers: str
    way: str
    gain: float
    seed: int
    goal: float
    curve: Curve


@dataclass(frozen=True, slots=True)
class Arrival:
    """When one run reached the loss of its seed.

    Args:
        workers: the mix, ALIKE or STRAGGLER.
        way: OWN_PACE or "rounds of K steps"; gain: of the run.
        seconds: virtual seconds; None if the run ended before.
    """

    workers: str
    way: str
    gain: float
    seed: int
    seconds: float | None


def reached(curve: Curve, loss: float) -> float | None:
    """The second in which a curve of (second, loss) first comes down to a loss; None if it never does."""
    before: Sequence[float] | None = None
    for point in curve:
        if point[1] <= loss:
            if before is None:
                return point[0]
            return before[0] + (point[0] - before[0]) * (before[1] - loss) / (before[1] - point[1])
        before = point
    return None


def with_straggler(run: Run, curve: Curve) -> list[list[float]]:
    """The curve of the same rounds if one worker needs four times as long: the weights are the same, only later."""
    slowest = min(plan.speed for plan in replace(run, mix=STRAGGLER).workers())
    return [
        [second + number * run.sync_s * (1 / slowest - 1), loss]
        for number, (second, loss) in enumerate(curve)
    ]


def traced(found: Iterable[tuple[Run, Outcome]]) -> list[Traced]:
    """A curve for every traced run whose seed has experts trained apart, on as many rows; two of a run in rounds."""
    pairs = list(found)
    goals = {
        (run.seed, run.rows): _goal(outcome)
        for run, outcome in pairs
        if run.scheme == "apart" and (run.mix, run.steps, run.rank) == ("three", 48, 8)
    }
    made = []
    for run, outcome in pairs:
        goal = goals.get((run.seed, run.rows))
        if not run.trace or goal is None:
            continue
        curves = {run.mix: outcome.curve}
        if run.scheme == "rounds":
            curves = {ALIKE: outcome.curve, STRAGGLER: with_straggler(run, outcome.curve)}
        way = f"rounds of {run.sync_s:g} steps" if run.scheme == "rounds" else OWN_PACE
        made += [Traced(workers, way, run.gain, run.seed, goal, curve) for workers, curve in curves.items()]
    return made


def arrivals(found: Iterable[tuple[Run, Outcome]]) -> list[Arrival]:
    """When each curve of `traced` comes down to its goal."""
    return [
        Arrival(one.workers, one.way, one.gain, one.seed, reached(one.curve, one.goal))
        for one in traced(found)
    ]


def _goal(outcome: Outcome) -> float:
    base, own = (statistics.fmean(outcome.losses[model].values()) for model in (BASE, OWN))
    return base - PART * (base - own)


def time_table(all_: Iterable[Arrival]) -> str:
    """The arrivals as aligned text: virtual seconds for each seed, `-` for a run that ended before."""
    rows: dict[tuple[str, str, float], list[str]] = defaultdict(list)
    for one in all_:
        rows[one.workers, one.way, one.gain].append("-" if one.seconds is None else f"{one.seconds:.1f}")
    if not rows:
        return ""
    lines = [f"virtual seconds to {PART:.0%} of perfect routing's gain, one for each seed"]
    lines += [
        f"  {workers:<10} {way:<19} gain {gain:g}   {'  '.join(seconds)}"
        for (workers, way, gain), seconds in sorted(rows.items())
    ]
    return "\n".join(lines)


def time_figures(all_: Sequence[Arrival]) -> Iterator[Result]:
    """Own pace ÷ the fastest rounds of the same seed, of any length and gain; and the ideal, by steps alone."""
    for workers in (ALIKE, STRAGGLER):
        ratios = []
        for one in all_:
            if one.workers != workers or one.way != OWN_PACE or one.seconds is None:
                continue
            others = [
                other.seconds
                for other in all_
                if (other.workers, other.seed) == (workers, one.seed)
                and other.way != OWN_PACE
                and other.seconds is not None
            ]
            if others:
                ratios.append(one.seconds / min(others))
        if ratios:
            yield figure(f"learning_time_own_pace_vs_rounds_{workers}", ratios, "x")
            speeds = [plan.speed for plan in Run(scheme="gateway", mix=workers).workers()]
            ideal = len(speeds) * min(speeds) / sum(speeds)
            yield figure(f"learning_time_own_pace_vs_rounds_{workers}_ideal", [ideal], "x")
