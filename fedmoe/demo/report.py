"""The demo's results: a plot, a table of the processes, and a JSON file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmoe.demo.processes import Child

History = Mapping[str, Sequence[tuple[float, float]]]
Losses = Mapping[str, Mapping[str, float]]


def plot(file: Path, history: History, losses: Losses) -> None:
    """Plot the training loss of each expert over time, and the held-out losses as bars, into one PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=(1, 1.3))
    for name, points in history.items():
        left.plot([t for t, _ in points], [loss for _, loss in points], marker="o", markersize=3, label=name)
    left.set(xlabel="seconds", ylabel="training loss of the last update", title="Experts, update by update")
    left.legend(frameon=False)
    left.grid(alpha=0.3)
    columns = list(next(iter(losses.values())))
    width = 0.8 / len(losses)
    for number, (row, values) in enumerate(losses.items()):
        places = [index + (number - (len(losses) - 1) / 2) * width for index in range(len(columns))]
        right.bar(places, [values[column] for column in columns], width * 0.92, label=row)
    right.set_xticks(range(len(columns)), columns)
    right.set(ylabel="loss per token of the answer", title="Held-out loss: lower is better")
    right.legend(frameon=False, fontsize=8)
    right.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def process_table(children: Sequence[Child]) -> str:
    """A table of run time and peak memory of every process."""
    width = max(len(child.name) for child in children)
    lines = [f"{'process':<{width}}  seconds  peak MiB"]
    lines += [f"{child.name:<{width}}  {child.seconds:7.1f}  {child.peak_mib:8.0f}" for child in children]
    return "\n".join(lines)


def write_results(file: Path, losses: Losses, children: Sequence[Child], *, seconds: float) -> None:
    """Write all figures of the run as JSON."""
    processes = {c.name: {"seconds": round(c.seconds, 1), "peak_mib": round(c.peak_mib, 1)} for c in children}
    content = {"held_out_loss": losses, "processes": processes, "seconds": round(seconds, 1)}
    file.write_text(json.dumps(content, indent=2) + "\n")
