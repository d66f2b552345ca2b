"""fedmoe.tools.share: the part of the experts' own gain that a row has, in closed form, and the table that shows it."""

import math

import pytest

from fedmoe.tools.evaluate import Matrix
from fedmoe.tools.share import format_table, routed_losses, shares, table_rows

BASE = {"red": 4.0, "blue": 6.0, "mean": 5.0}
RED = {"red": 2.0, "blue": 6.5, "mean": 4.25}
BLUE = {"red": 4.5, "blue": 2.0, "mean": 3.25}
GATEWAY = {"red": 3.0, "blue": 3.0, "mean": 3.0}
MATRIX = {"base": BASE, "red": RED, "blue": BLUE, "gateway": GATEWAY}


def test_share_is_the_part_of_the_gain_of_perfect_routing() -> None:
    """Perfect routing gains 5 - 2 = 3; the gateway 5 - 3 = 2 of it, red alone 0.75, and the base model nothing."""
    assert routed_losses(MATRIX, ["red", "blue"]) == {"red": 2.0, "blue": 2.0, "mean": 2.0}
    share = shares(MATRIX, ["red", "blue"])
    assert list(share) == ["base", "red", "blue", "routed", "gateway"]
    assert share == pytest.approx({"base": 0, "red": 0.25, "blue": 1.75 / 3, "routed": 1, "gateway": 2 / 3})


def test_row_can_lose_or_gain_more_than_perfect_routing() -> None:
    """A share is no part of a whole: below 0 and above 1 it stays as it is."""
    rows = {
        "worse": {"red": 5.5, "blue": 7.5, "mean": 6.5},
        "better": {"red": 1.0, "blue": 1.5, "mean": 1.25},
    }
    share = shares(MATRIX | rows, ["red", "blue"])
    assert (share["worse"], share["better"]) == (pytest.approx(-0.5), pytest.approx(1.25))


def test_domain_without_expert_is_left_out_of_the_share() -> None:
    """Its cell of `routed` is empty and so is the mean; the share is that of the other domains."""
    green = {
        name: row | {"green": 9.0, "mean": (row["red"] + row["blue"] + 9) / 3} for name, row in MATRIX.items()
    }
    assert routed_losses(green, ["red", "blue"]) == {"red": 2.0, "blue": 2.0, "green": None, "mean": None}
    assert shares(green, ["red", "blue"]) == shares(MATRIX, ["red", "blue"])


def test_expert_whose_domain_is_not_measured_has_a_share_too() -> None:
    """Perfect routing is then over the domains that are."""
    matrix = {name: {"red": row["red"], "mean": row["red"]} for name, row in MATRIX.items()}
    assert shares(matrix, ["red", "blue"]) == pytest.approx(
        {"base": 0, "red": 1, "blue": -0.25, "routed": 1, "gateway": 0.5}
    )


@pytest.mark.parametrize(
    ("experts", "routed"),
    [
        ({"red": 4.0, "blue": 6.0}, True),  # they gain nothing
        ({"red": 9.0, "blue": 6.0}, True),  # they lose
        ({"red": math.nan, "blue": 2.0}, True),
        ({}, False),  # no domain has one
    ],
)
def test_share_is_undefined_without_gain(experts: dict[str, float], *, routed: bool) -> None:
    """For every row, also for perfect routing."""
    rows = {name: {"red": loss, "blue": loss, "mean": loss} for name, loss in experts.items()}
    matrix: Matrix = {"base": BASE, **rows, "gateway": GATEWAY}
    share = shares(matrix, list(experts))
    assert ("routed" in share) == routed
    assert set(share.values()) == {None}


def test_row_that_is_no_number_has_no_share() -> None:
    """An adapter whose loss is NaN; JSON has no NaN."""
    broken = {"broken": {"red": math.nan, "blue": 1.0, "mean": math.nan}}
    share = shares(MATRIX | broken, ["red", "blue"])
    assert (share["broken"], share["routed"]) == (None, 1.0)


def test_table_marks_the_best_model_of_each_column() -> None:
    """Aligned columns, a star at the lowest loss; perfect routing is no model, and what is undefined is a dash."""
    matrix = {
        "base": {"sql": 1.4091, "python_expert": 12.5, "mean": 6.95},
        "sql": {"sql": 0.4091, "python_expert": 13.5, "mean": 6.95},
        "gateway": {"sql": 0.9091, "python_expert": 13.0, "mean": 6.525},
    }
    routed, share = routed_losses(matrix, ["sql"]), shares(matrix, ["sql"])
    assert list(table_rows(matrix, routed, share)) == ["base", "sql", "routed", "gateway"]
    assert format_table(matrix, routed, share).splitlines() == [
        "                   sql   python_expert            mean   share",
        "base             1.409          12.500*          6.950      0%",
        "sql              0.409*         13.500           6.950    100%",
        "routed           0.409               -               -    100%",
        "gateway          0.909          13.000           6.525*    50%",
    ]
    nothing = shares({"base": matrix["base"]}, [])
    assert format_table({"base": matrix["base"]}, {}, nothing).splitlines()[1].split()[-1] == "-"
