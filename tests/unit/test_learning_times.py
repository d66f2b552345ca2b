"""ops.bench.learning.times: when a loss is reached, at the workers' own pace and in rounds."""

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from ops.bench.learning.carry import BASE, OWN, Outcome, kept
from ops.bench.learning.curves import plot_times
from ops.bench.learning.runs import Run
from ops.bench.learning.times import ALIKE, STRAGGLER, arrivals, reached, time_figures, time_table, traced
from ops.bench.race_kept import Curve
from tests.unit.test_learning_report import MEASURED, outcome


def test_when_a_loss_is_reached() -> None:
    curve = [[0.0, 2.0], [6.0, 1.4], [12.0, 1.3], [18.0, 1.1]]
    assert reached(curve, 2.5) == 0.0
    assert reached(curve, 1.7) == pytest.approx(3.0)
    assert reached(curve, 1.2) == pytest.approx(15.0)
    assert reached(curve, 1.0) is None


def test_own_pace_beside_the_fastest_rounds_of_the_same_seed() -> None:
    """The loss to reach is 2.0 - 0.8 x (2.0 - 1.0) = 1.2."""

    def traced(run: Run, curve: list[list[float]]) -> tuple[Run, Outcome]:
        return run, replace(outcome(run, gateway=1.0), curve=curve)

    apart = Run(scheme="apart", merges=False, rows=16)
    paced = {"scheme": "gateway", "gain": 2.0, "trace": True, "rows": 16}
    rounds = {"scheme": "rounds", "mix": ALIKE, "trace": True, "rows": 16}
    found = [
        (apart, outcome(apart, **{BASE: 2.0, OWN.replace(" ", "_"): 1.0})),
        traced(Run(mix=ALIKE, **paced), [[0.0, 2.0], [10.0, 1.2]]),
        traced(Run(mix=STRAGGLER, **paced), [[0.0, 2.0], [12.0, 1.2]]),
        traced(Run(sync_s=6.0, **rounds), [[0.0, 2.0], [7.0, 1.2]]),
        traced(Run(sync_s=3.0, **rounds), [[0.0, 2.0], [4.0, 1.3], [8.0, 1.2]]),
        traced(Run(sync_s=12.0, **rounds), [[0.0, 2.0], [13.0, 1.3]]),
        traced(Run(sync_s=3.0, seed=1, **rounds), [[0.0, 2.0], [1.0, 1.0]]),  # of a seed without experts
    ]
    made = arrivals(found)
    figures_ = {result.name: result for result in time_figures(made)}
    assert figures_["learning_time_own_pace_vs_rounds_four"].value == pytest.approx(10 / 7)
    assert figures_["learning_time_own_pace_vs_rounds_straggler"].value == pytest.approx(12 / 25)
    assert figures_["learning_time_own_pace_vs_rounds_straggler"].met
    assert figures_["learning_time_own_pace_vs_rounds_straggler_ideal"].value == pytest.approx(1 / 3.25)
    assert "straggler  rounds of 12 steps  gain 1   -" in time_table(made)


def test_curves_are_drawn_with_their_goals_and_races(tmp_path: Path) -> None:
    """A panel for each mix of workers and each race; without curves there is no file."""
    file = tmp_path / "curves.png"
    plot_times(file, [], [])
    assert not file.exists()
    ours = Curve("alike", "FedMoE, every 10 s", 1.5, [(0.0, 2.0, 0.0), (9.0, 1.4, 0.0)])
    sizes = []
    for curves, races in (([], [ours]), (traced(kept(MEASURED)), []), (traced(kept(MEASURED)), [ours])):
        plot_times(file, curves, races)
        sizes.append(plt.imread(file).shape)
    (race_height, race_width, _), (height, width, _), both = sizes
    assert width == 2 * race_width
    assert both[:2] == (height + race_height, width)


def test_the_page_has_the_figures_of_the_kept_runs() -> None:
    """The runs in the repository are those of the table of docs/benchmarks.md."""
    found = arrivals(kept(MEASURED))
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    for way, name in (("own pace", "own pace, gain 2"), ("rounds of 6 steps", "rounds of 6 steps, gain 2")):
        seconds = {
            one.workers: one.seconds for one in found if (one.way, one.gain, one.seed) == (way, 2.0, 0)
        }
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {name}")]
        assert line.endswith(f"| {seconds[ALIKE]:.1f} | {seconds[STRAGGLER]:.1f} |")
