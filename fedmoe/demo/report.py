"""The demo's results: a plot, a table of the processes, and a JSON file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe.demo.processes import Child
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
    for name, points in history.items():
        left.plot([t for t, _ in points], [loss for _, loss in points], marker="o", markersize=3, label=name)
    left.set(xlabel="seconds", ylabel="training loss of the last update", title="Experts, update by update")
    left.legend(frameon=False)
    left.grid(alpha=0.3)
    draw_losses(right, table_rows(measured.loss, measured.routed, measured.share), measured.share)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


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
