"""The record of the merged gateway's fit, the groups of layers, and the files of validation rows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedmoe.errors import DataError, SettingsError, SpecError, UnknownExpertError
from fedmoe.protocol.fit import Fit, FitRows, FittedOn, groups_of, parse_weights, weights_text
from fedmoe.settings import FitSettings
from fedmoe.tools.rows import find_files, find_validation_files
from tests.errors import raises

FIT = Fit(
    weights=weights_text({"red": (0.5, 0.0), "blue": (1.0 / 3, 2.0)}),
    fitted_on=json.dumps({"red": FittedOn(3, "c", "l")._asdict()}),
    data=json.dumps({"red": FitRows(64, "d")._asdict()}),
    loss=1.5,
    before=json.dumps({"base": 2.5, "scale 1": 2.0}),
    fitted_at=1.7e9 + 0.125,
    software="fedmoe 1",
)


def test_what_is_written_is_read() -> None:
    assert Fit.read(FIT.to_fields()) == FIT
    assert FIT.by_expert == {"red": (0.5, 0.0), "blue": (0.333333, 2.0)}
    assert FIT.experts == {"red": FittedOn(3, "c", "l")}
    assert FIT.rows == {"red": FitRows(64, "d")}
    assert FIT.losses_before == {"base": 2.5, "scale 1": 2.0}
    assert Fit().by_expert == Fit().experts == {}


@pytest.mark.parametrize("at", [None, 0.0, -1e300, 1e300, float("nan"), float("inf")])
def test_the_day_of_a_fit(at: float | None) -> None:
    assert FIT.day == "2023-11-14"
    assert replace(FIT, fitted_at=at).day == "an unknown day"


def test_a_fit_is_named_by_what_it_says() -> None:
    assert FIT.id == Fit.read(FIT.to_fields()).id
    assert FIT.id != replace(FIT, weights=weights_text({"red": (0.5,)})).id
    assert FIT.id != replace(FIT, fitted_at=1.0).id


@pytest.mark.parametrize(
    ("weights", "about"),
    [
        ("[1]", "fit"),
        ("{", "fit"),
        ('{"red": 1}', "fit"),
        ('{"red": ["1"]}', "fit"),
        ('{"red": [true]}', "fit"),
        ('{"red": [1' + 400 * "0" + "]}", "fit"),
        ('{"red": [NaN]}', "weights"),
        ('{"red": [-1], "blue": [2]}', "weights"),
        ('{"red": [Infinity]}', "weights"),
        ('{"red": [0], "blue": [0.0]}', "weights"),
        ('{"red": [1e308], "blue": [1e308]}', "weights"),
        ('{"red": [1], "blue": [1, 2]}', "groups"),
        ('{"red": []}', "groups"),
    ],
)
def test_weights_that_cannot_be_merged_are_refused(weights: str, about: str) -> None:
    """Among them those that do not sum to a number above 0."""
    with raises(SpecError, about=about):
        parse_weights(weights)


@pytest.mark.parametrize("text", ['{"red": {"version": "x"}}', '{"red": "x"}', '{"red": {}}', "3"])
def test_other_fields_that_were_edited_are_refused(text: str) -> None:
    for field, name in (("fitted_on", "experts"), ("data", "rows"), ("before", "losses_before")):
        with raises(SpecError, about="fit"):
            getattr(replace(FIT, **{field: text}), name)


def test_groups_of_layers_are_of_equal_size_and_in_order() -> None:
    modules = [f"base_model.model.model.layers.{n}.mlp.experts.7.up" for n in range(12)]
    assert [groups_of(modules, 3)[module] for module in modules] == [0] * 4 + [1] * 4 + [2] * 4
    assert set(groups_of(modules, 1).values()) == {0}
    assert list(groups_of(modules, 12).values()) == list(range(12))
    assert list(groups_of(modules, 24).values()) == list(range(0, 24, 2))
    assert groups_of(["lm_head", "model.layers.1.q"], 2) == {"lm_head": 0, "model.layers.1.q": 1}
    assert groups_of([], 2) == {}


def test_validation_files_are_never_test_rows(tmp_path: Path) -> None:
    """In a directory only <expert>.valid.jsonl counts; a file alone is a domain of its own name."""
    for name in ("red.jsonl", "red.test.jsonl", "blue.valid.jsonl", "all of it.jsonl"):
        (tmp_path / name).write_text("")
    assert find_validation_files([str(tmp_path)], ["red", "blue"]) == {"blue": tmp_path / "blue.valid.jsonl"}
    pooled = str(tmp_path / "all of it.jsonl")
    assert find_validation_files([pooled], ["red"]) == {"all-of-it": Path(pooled)}
    assert find_validation_files([f"red={pooled}"], ["red"]) == {"red": Path(pooled)}
    with raises(UnknownExpertError, about="rad"):  # else its rows would be taken for pooled ones
        find_validation_files([f"rad={pooled}"], ["red"])
    with raises(DataError, about="data"):
        find_validation_files([str(tmp_path)], ["red"])
    for text in (f"red={tmp_path / 'red.test.jsonl'}", str(tmp_path / "red.test.jsonl")):
        with raises(SettingsError, about="test"):
            find_validation_files([text], ["red"])
    with raises(SettingsError, about="data") as caught:
        find_validation_files([str(tmp_path / "nothing.jsonl")], ["red"])
    assert "there is no " in str(caught.value)


def test_settings_have_bounds() -> None:
    for name in ("layer_groups", "max_passes", "batch_size"):
        with raises(SettingsError, about=name):
            FitSettings(data=("x",), **{name: 0})


def test_data_that_is_not_there_is_told_alike(tmp_path: Path) -> None:
    """By both commands; of a file without its expert, that it is one."""
    file = tmp_path / "rows.jsonl"
    file.touch()
    told = []
    for find in (find_files, find_validation_files):
        with raises(SettingsError, about="data") as caught:
            find(["nope"], ["red"])
        told.append(str(caught.value))
    assert told == [
        "there is no 'nope': --data takes a directory, or EXPERT=FILE",
        "there is no 'nope': --data takes a directory, a file, or EXPERT=FILE",
    ]
    with pytest.raises(
        SettingsError, match="is a file of no expert: --data takes a directory, or EXPERT=FILE"
    ):
        find_files([str(file)], ["red"])
