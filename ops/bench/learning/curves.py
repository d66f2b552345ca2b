"""The plot of losses over time: on the virtual clock at the workers' own pace and in rounds, and beside Flower."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ops.bench.learning.times import ALIKE, OWN_PACE, STRAGGLER, Traced
from ops.bench.race_kept import Curve

MIX_TITLES = {ALIKE: "four workers, all alike", STRAGGLER: "one of four is four times slower"}


def plot_times(file: Path, traced: Sequence[Traced], races: Sequence[Curve]) -> None:
    """Write the curves into one PNG file, a panel for each mix of workers and each race; no file without curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mixes = [mix for mix in MIX_TITLES if any(one.workers == mix for one in traced)]
    names = list(dict.fromkeys(curve.race for curve in races))
    columns = max(len(mixes), len(names))
    if not columns:
        return
    rows = [row for row in (mixes, names) if row]
    canvas, panels = plt.subplots(len(rows), columns, figsize=(6 * columns, 4.2 * len(rows)), squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for place, mix in enumerate(mixes):
        _draw_mix(panels[0][place], mix, [one for one in traced if one.workers == mix])
    for place, name in enumerate(names):
        _draw_race(panels[-1][place], name, [curve for curve in races if curve.race == name])
    canvas.tight_layout()
    canvas.savefig(file, dpi=110)
    plt.close(canvas)


def _draw_mix(panel: Any, mix: str, traced: Iterable[Traced]) -> None:
    colours: dict[str, str] = {}
    goals = set()
    for one in sorted(traced, key=lambda one: (one.way != OWN_PACE, one.way, one.gain)):
        name = f"{one.way}, gain {one.gain:g}"
        is_first = name not in colours
        colour = colours.setdefault(name, f"C{len(colours)}")
        width = 2.0 if one.way == OWN_PACE else 1.0
        panel.plot(
            *zip(*one.curve, strict=True), color=colour, linewidth=width, label=name if is_first else None
        )
        goals.add(one.goal)
    _finish(panel, MIX_TITLES[mix], "virtual seconds", goals)


def _draw_race(panel: Any, name: str, curves: Iterable[Curve]) -> None:
    goals = set()
    for curve in curves:
        seconds, losses, _ = zip(*curve.points, strict=True)
        panel.plot(seconds, losses, marker=".", label=curve.who)
        goals.add(curve.goal)
    _finish(panel, f"race in real processes: {name}", "seconds", goals)


def _finish(panel: Any, title: str, unit: str, goals: Iterable[float]) -> None:
    for goal in sorted(goals):
        panel.axhline(goal, color="black", linestyle="--", linewidth=0.8)
    panel.set_axis_on()
    panel.set(title=title, xlabel=unit, ylabel="held-out loss; dashed: the loss to reach")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
