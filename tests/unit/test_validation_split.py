"""Which rows are held back: the same ones at each start, in any order, and never one that was trained on."""

import json
import random
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from fedmoe.data.bad_rows import BadRows
from fedmoe.data.encode import Answer, Example, row_hash
from fedmoe.data.examples import make_examples
from fedmoe.data.flat import FlatExamples
from fedmoe.data.jsonl import open_data
from fedmoe.data.shapes import read_conversation
from fedmoe.data.validation_split import LEAST_ROWS, MOST_ROWS, Split, split
from fedmoe.errors import DataError, SettingsError
from fedmoe.util.hold_back import HoldBack
from tests.errors import raises
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def splitting(rows: Iterable[int], wanted: str, *, source: Callable[[int], str] = lambda n: "") -> Split:
    """The split of a file with these numbers as rows."""
    examples = FlatExamples()
    examples.extend(
        Example(
            array("i", [n]), (Answer(0, 1, 1.0),), 0, row_hash(n), row_hash(source(n)) if source(n) else 0
        )
        for n in rows
    )
    return split(examples, HoldBack.parse(wanted), where="rows.jsonl")


def numbers(examples: Iterable[Example]) -> list[int]:
    return [one.input_ids[0] for one in examples]


@pytest.mark.parametrize("wanted", ["2%", "10%", "30%", "20"])
def test_split_is_the_same_in_any_order(wanted: str) -> None:
    """And at each start; training keeps the order of the file, and together they are the file."""
    rows = list(range(300))
    first = splitting(rows, wanted)
    second = splitting(random.Random(0).sample(rows, len(rows)), wanted)
    assert set(numbers(first.validation)) == set(numbers(second.validation))
    assert splitting(rows, wanted).digest == first.digest != ""
    assert len(first.validation) == first.rows > 0
    assert numbers(first.training) == sorted(set(rows) - set(numbers(first.validation)))
    assert numbers(first.training[:3]) == [first.training[n].input_ids[0] for n in range(3)]


@pytest.mark.parametrize("wanted", ["2%", "5%", "40%", "10"])
def test_row_that_was_trained_on_is_never_held_back_later(wanted: str) -> None:
    """However many rows are added, to a small file and to a large one."""
    trained, held = set[int](), list[set[int]]()
    for count in (12, 30, 79, 80, 200, 600, 900, 1500, 5000):
        made = splitting(range(count), wanted)
        trained |= set(numbers(made.training))
        held.append(set(numbers(made.validation)))
        assert not trained & held[-1], count
    if wanted == "5%":
        assert held[5] < held[6]  # between the bounds of a small and a large file, no row changes sides


def test_equal_rows_are_on_one_side(tmp_path: Path) -> None:
    """Also if one is written otherwise; they count as one row."""
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(60)]
    chats = [
        {
            "messages": [
                {"role": "user", "content": r["prompt"]},
                {"role": "assistant", "content": r["completion"]},
            ]
        }
        for r in rows
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *chats, *rows]))
    bad_rows = BadRows(report=print)
    examples = make_examples(open_data(file, bad_rows), TOKENIZER, 64, bad_rows).examples
    made = split(examples, HoldBack(rows=20), where="rows.jsonl")
    assert (made.rows, made.of, len(made.validation)) == (20, 60, 60)
    sides = [{bytes(one.input_ids) for one in side} for side in (made.training, made.validation)]
    assert not sides[0] & sides[1]


def test_rows_are_held_back_by_source() -> None:
    """If rows name enough sources; a source is on one side whole."""
    made = splitting(range(500), "10%", source=lambda n: f"file {n % 50}")
    held, trained = ({n % 50 for n in numbers(side)} for side in (made.validation, made.training))
    assert made.by_source
    assert made.rows == 10 * len(held) > 0
    assert not held & trained
    assert "by their source" in str(made)
    assert not splitting(range(500), "10%", source=lambda n: f"set {n % 3}").by_source
    assert not splitting(range(500), "10%", source=lambda n: f"file {n}" if n % 2 else "big").by_source


def test_sources_are_read_from_the_rows() -> None:
    """From one of the usual fields, if it is a text or a number."""
    plain = {"prompt": "a", "completion": "b"}
    for row, source in (({"source": " x "}, "x"), ({"file": 3}, "3"), ({"source": ["x"]}, ""), ({}, "")):
        assert read_conversation(plain | row).source == source
    assert read_conversation(plain | {"source": "x"}).unused == ()


def test_number_of_rows_is_within_bounds() -> None:
    """Of a share; a number is taken as it is."""
    assert splitting(range(120), "1%").rows == LEAST_ROWS
    assert splitting(range(1000), "50%").rows == MOST_ROWS
    assert splitting(range(1000), "100").rows == 100
    assert splitting(range(30), "2%").rows <= LEAST_ROWS
    assert "no row is held back" in str(splitting(range(3), "0%"))


def test_bad_input() -> None:
    """One sentence each."""
    for odd in ("two", "-1", "1.5", "2 %%", "", "1e9%", "nan%", "٣%", "100%"):
        with raises(SettingsError, about="validate"):
            HoldBack.parse(odd)
    for wanted in ("5", "6"):
        with raises(DataError, about="validate"):
            splitting(range(5), wanted)
    assert splitting(range(5), "4").rows == 4
