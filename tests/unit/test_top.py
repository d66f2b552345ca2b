"""What `fedmoe top` shows: order, filter, the first row, and any size of the terminal."""

import pytest
from rich.cells import cell_len

from fedmoe.cli.top_view import PANES, View, rows_of, sort_key
from fedmoe.protocol.federation import CurveView, ExpertView, Federation, GoneWorker, ServerView, WorkerView
from fedmoe.protocol.merged_view import MergedView


def federation(workers: int = 30) -> Federation:
    """An expert with workers, another without anything."""
    theirs = tuple(
        WorkerView(
            expert="sql", name=f"w{n}", step=n * 7 % 30, loss=None if n % 3 else n / 10, last_seen_s=float(n)
        )
        for n in range(workers)
    )
    curve = CurveView(worker="w1", rows=8, best=1.0, best_version=1, last=1.0, last_version=1, trend="better")
    experts = (
        ExpertView(
            name="sql", workers=theirs, left=(GoneWorker(name="gone", how="failed"),), curves=(curve,)
        ),
        ExpertView(name="数据库", lease="", problems=("its meta is missing " * 9,)),
    )
    return Federation(
        prefix="fedmoe",
        server=ServerView(url="unix:///x"),
        experts=experts,
        merged=MergedView(built_from={}, present={}),
    )


def screen(view: View, width: int = 100, height: int = 20, seen: Federation | None = None) -> list[str]:
    lines = view.lines(seen or federation(), problem="", now="12:00:00Z", width=width, height=height)
    return [text for text, _ in lines]


@pytest.mark.parametrize(
    ("cells", "ordered"),
    [
        (["10", "9", "-", "100"], ["9", "10", "100", "-"]),
        (["2 h", "3 min", "90 s", "1 days", "-"], ["90 s", "3 min", "2 h", "1 days", "-"]),
        (["bob", "Ann", "-", "cleo"], ["Ann", "bob", "cleo", "-"]),
        (["1.500", "-0.5", "12"], ["-0.5", "1.500", "12"]),
        (["joining", "3 s"], ["3 s", "joining"]),
    ],
)
def test_cells_sort_by_what_they_mean(cells: list[str], ordered: list[str]) -> None:
    """Not as text."""
    assert sorted(cells, key=sort_key) == ordered


def test_what_is_not_known_comes_last_in_either_order() -> None:
    """Rows without a loss."""
    view = View(pane="workers")
    rows = rows_of(federation(), "workers")
    for falls in (False, True):
        view.order["workers"] = (5, falls)
        losses = [row[5] for row in view.chosen(rows)]
        assert losses[10:] == ["-"] * 20
        assert losses[:10] == sorted(losses[:10], reverse=falls)


@pytest.mark.parametrize("pane", PANES)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (20, 5), (40, 6), (80, 24), (300, 100)])
def test_every_size_is_filled(pane: str, width: int, height: int) -> None:
    """Never more lines than there are, and each of them one line; with and without a state, a problem or help."""
    for view in (
        View(pane=pane),
        View(pane=pane, is_help=True),
        View(pane=pane, text="no such"),
        View(pane=pane, first=99),
    ):
        for seen in (federation(), federation(0), None):
            lines = view.lines(seen, problem="Redis is away", now="now", width=width, height=height)
            assert len(lines) <= height
            assert all("\n" not in text for text, _ in lines)
            if height >= 6 and not view.is_help:
                assert len(lines) == height


def test_scrolling_ends_where_the_rows_end() -> None:
    """Also after the filter or the pane has changed."""
    view = View(pane="workers")
    assert screen(view)[-1].startswith("1-16 of 30")
    for keys, foot in (
        (["up"], "1-16 of 30"), (["down", "down"], "3-18 of 30"), (["page down"], "15-30 of 30"),
        (["page up"], "1-16 of 30"), (["end"], "15-30 of 30"), (["/", "w", "2"], "1-11 of 11"),
        (["backspace", "9", "enter"], "1-1 of 1"), (["escape", "end", "1"], "1-2 of 2"),
        (["2", "G", "g"], "1-16 of 30"),
    ):  # fmt: skip
        assert all(view.press(key) for key in keys)
        assert screen(view)[-1].startswith(foot), keys


def test_letters_that_are_typed_into_the_filter_are_no_commands() -> None:
    """`q` quits only where it is a command."""
    view = View()
    for key in ("/", "q", "?", "up", "\x1b[3~"):
        assert view.press(key)
    assert view.text == "q?"
    assert view.press("enter")
    assert not view.press("q")


def test_columns_are_chosen_round_and_round() -> None:
    """To the right from the first, to the left from the last."""
    view = View(pane="refusals")
    seen = []
    for key in ("right", "right", "left", "left", "left"):
        view.press(key)
        seen.append(view.order["refusals"][0])
    assert seen == [0, 1, 0, 3, 2]


def test_findings_are_whole() -> None:
    """A long one goes on in the next line."""
    lines = screen(View(pane="findings"), width=40, height=80)
    text = " ".join(line.strip() for line in lines)
    assert "数据库: its meta is missing its meta is" in text
    assert max(map(cell_len, lines[3:-1])) <= 40
