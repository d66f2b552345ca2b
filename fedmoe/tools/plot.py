"""The table of an evaluation as a picture; needs matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmoe.errors import SettingsError
from fedmoe.tools.share import Row, format_share


def pyplot() -> Any:
    """`matplotlib.pyplot`, which draws into files only.

    Raises:
        SettingsError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise SettingsError(
            "matplotlib is not installed, and a plot needs it: pip install matplotlib", about="matplotlib"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_losses(axes: Any, rows: Mapping[str, Row], share: Mapping[str, float | None]) -> None:
    """Draw the losses as bars, one group for each domain and one for the mean; the legend names each row's share."""
    columns = list(next(iter(rows.values())))
    width = 0.8 / len(rows)
    for number, (row, losses) in enumerate(rows.items()):
        offset = (number - (len(rows) - 1) / 2) * width
        bars = [
            (place + offset, loss)
            for place, column in enumerate(columns)
            if (loss := losses[column]) is not None
        ]
        label = f"{row} ({format_share(share[row])})"
        axes.bar([place for place, _ in bars], [loss for _, loss in bars], width * 0.92, label=label)
    axes.set_xticks(range(len(columns)), columns)
    axes.set(ylabel="loss per token of the answer", title="Held-out loss: lower is better")
    axes.legend(
        frameon=False, fontsize=8, title="row (share of the experts' own gain)", title_fontsize=8,
        loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4,
    )  # fmt: skip
    axes.grid(axis="y", alpha=0.3)


def plot_losses(file: Path, rows: Mapping[str, Row], share: Mapping[str, float | None]) -> None:
    """Draw the table into a PNG file."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5))
    draw_losses(axes, rows, share)
    figure.tight_layout()
    figure.savefig(file, dpi=110, format="png")
    plt.close(figure)
