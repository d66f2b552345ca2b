"""The demo's results: a plot, a table of the processes, and a JSON file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe.demo.processes import Child
from fedmoe.protocol.names import GATEWAY
from fedmoe.tools.plot import draw_losses, pyplot
from fedmoe.tools.share import table_rows

History = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The losses and shares that `fedmoe evaluate --json` wrote."""

    loss: dict[str, dict[str, float]]
    routed: dict[str, float | None]
    share: dict[str, float | None]

    @classmethod
    def read(cls, file: Path) -> "Measured":
        """Read the file."""
        content: dict[str, Any] = json.loads(file.read_text())
        return cls(loss=content["loss"], routed=content["routed"], share=content["share"])


def plot(file: Path, history: History, measured: Measured) -> None:
    """Plot the training loss of each expert over time, and the held-out losses as bars, into one PNG file."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=(1, 1.3))
    domains = len(history.keys() - {GATEWAY})
    for name, points in sorted(history.items(), key=lambda curve: (curve[0] == GATEWAY, curve[0])):
        drawn, label = points, name
        if name == GATEWAY:  # its updates come from one domain after the other
            drawn, label = mean_of_last(points, domains), f"{name}, mean of {domains} updates"
        left.plot([t for t, _ in drawn], [loss for _, loss in drawn], marker="o", markersize=3, label=label)
    left.set(xlabel="seconds", ylabel="training loss of the last update", title="Training, update by update")
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    left.grid(alpha=0.3)
    draw_losses(right, table_rows(measured.loss, measured.routed, measured.share), measured.share)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def mean_of_last(points: Sequence[tuple[float, float]], n: int) -> list[tuple[float, float]]:
    """Each point with the mean of its loss and those before it, n in all; without the first n - 1 points."""
    return [
        (points[last][0], sum(loss for _, loss in points[last + 1 - n : last + 1]) / n)
        for last in range(n - 1, len(points))
    ]


def process_table(children: Sequence[Child]) -> str:
    """A table of run time and peak memory of every process."""
    width = max(len(child.name) for child in children)
    lines = [f"{'process':<{width}}  seconds  peak MiB"]
    lines += [f"{child.name:<{width}}  {child.seconds:7.1f}  {child.peak_mib:8.0f}" for child in children]
    return "\n".join(lines)


def write_results(file: Path, measured: Measured, children: Sequence[Child], *, seconds: float) -> None:
    """Write all figures of the run as JSON."""
    processes = {c.name: {"seconds": round(c.seconds, 1), "peak_mib": round(c.peak_mib, 1)} for c in children}
    content = {
        "held_out_loss": measured.loss,
        "routed": measured.routed,
        "share": measured.share,
        "processes": processes,
        "seconds": round(seconds, 1),
    }
    file.write_text(json.dumps(content, indent=2) + "\n")
