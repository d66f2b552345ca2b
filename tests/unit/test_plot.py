"""The picture of an evaluation: a bar for each loss, a share for each row; matplotlib is needed only for it."""

import sys
from pathlib import Path

import pytest

from fedmoe.demo.report import Measured, mean_of_last, plot
from fedmoe.errors import SettingsError
from fedmoe.tools.plot import draw_losses, plot_losses, pyplot
from fedmoe.tools.share import Row, table_rows
from tests.errors import raises

MEASURED = Measured(
    loss={"base": {"red": 4.0, "blue": 6.0, "mean": 5.0}, "red": {"red": 2.0, "blue": 6.5, "mean": 4.25}},
    routed={"red": 2.0, "blue": None, "mean": None},
    share={"base": 0.0, "red": 1.0, "routed": None},
)
ROWS: dict[str, Row] = table_rows(MEASURED.loss, MEASURED.routed, MEASURED.share)


def test_every_loss_is_a_bar_in_the_group_of_its_domain() -> None:
    """Nothing where there is no loss; the legend names rows and shares."""
    figure, axes = pyplot().subplots()
    draw_losses(axes, ROWS, MEASURED.share)
    heights = [[bar.get_height() for bar in container] for container in axes.containers]
    assert heights == [[4.0, 6.0, 5.0], [2.0, 6.5, 4.25], [2.0]]
    groups = [
        [round(bar.get_x() + bar.get_width() / 2) for bar in container] for container in axes.containers
    ]
    assert groups == [[0, 1, 2], [0, 1, 2], [0]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["red", "blue", "mean"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "base (0%)",
        "red (100%)",
        "routed (-)",
    ]
    pyplot().close(figure)


def test_pictures_are_png_files(tmp_path: Path) -> None:
    """Whatever the file is called; the demo's has the curves of training too."""
    plot_losses(tmp_path / "losses", ROWS, MEASURED.share)
    plot(tmp_path / "demo.png", {"red": [(0.0, 2.0), (1.0, 1.5)], "gateway": [(1.0, 3.0)]}, MEASURED)
    for name in ("losses", "demo.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_gateways_curve_is_the_mean_over_a_round_of_the_domains() -> None:
    """At the time of the last update of the round; there is none before the first round."""
    points = [(1.0, 3.0), (2.0, 6.0), (3.0, 0.0), (5.0, 9.0)]
    assert mean_of_last(points, 3) == [(3.0, 3.0), (5.0, 5.0)]
    assert mean_of_last(points, 1) == points
    assert mean_of_last(points[:2], 3) == []


def test_missing_matplotlib_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes with the demo's requirements only."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with raises(SettingsError, about="matplotlib"):
        pyplot()
