"""Rows that cannot be used: ten named, all counted, all kept where that is wanted."""

import json
import re
from pathlib import Path

import pytest

from fedmoe.data.bad_rows import BadRows
from fedmoe.data.examples import make_examples
from fedmoe.data.jsonl import open_data
from fedmoe.errors import DataError, SettingsError
from tests.errors import raises
from tests.tiny import tiny_tokenizer

GOOD = json.dumps({"prompt": "q", "completion": "a"})
NO_ANSWER = json.dumps({"prompt": "q", "completion": " "})
LONG = json.dumps({"prompt": "q" * 99, "completion": "a"})
TURN = json.dumps({"messages": [{"role": "narrator", "content": "a"}]})
BROKEN = '{"prompt": "caf\u00e9", "compl'
KINDS = {
    NO_ANSWER: "its answer is empty",
    LONG: "its prompt leaves no room for the answer (max_length 64 tokens)",
    TURN: "it has a turn of an unknown role",
    BROKEN: "it is not JSON",
}
ABOUT = {TURN: "role", BROKEN: "JSON"}  # of those that the reader finds; the others are found by encoding


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows))
    return path


def read(path: Path, said: list[str], *, file: Path | None = None, fail: bool = False) -> str:
    """The summary of the data file's examples."""
    bad_rows = BadRows(report=said.append, file=file, fail=fail)
    return make_examples(open_data(path, bad_rows), tiny_tokenizer(), 64, bad_rows).summary()


def test_the_first_ten_are_named_and_all_are_counted_by_kind(tmp_path: Path) -> None:
    """By file, line and reason, in the order of the file, whoever found them: reader, template or length."""
    path = write(tmp_path / "rows.jsonl", GOOD, *[*KINDS] * 3, GOOD)
    said: list[str] = []
    kinds = "; ".join(f"3 × {kind}" for kind in KINDS.values())
    assert read(path, said) == f"14 rows: 2 used, 12 dropped ({kinds})"
    assert len(said) == 11
    for number, (line, kind) in enumerate(zip(said[:10], [*KINDS.values()] * 3, strict=False)):
        assert line.startswith(f"{path} line {number + 2}: {kind}")
    assert "'narrator'" in said[2]
    assert "(character 20)" in said[3]
    assert said[-1] == f"{path}: 2 more rows cannot be used; give --bad-rows FILE for a list of all 12"


def test_all_are_kept_in_a_file_as_they_stand_there(tmp_path: Path) -> None:
    """Text for text, also of several rows in one line; only the owner may read them."""
    path = write(tmp_path / "rows.jsonl", f"[{GOOD}, {NO_ANSWER}, {LONG}]")
    file = tmp_path / "bad.jsonl"
    read(path, [], file=file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [
        {"file": str(path), "line": 1, "reason": KINDS[text], "text": text} for text in (NO_ANSWER, LONG)
    ]
    assert file.stat().st_mode & 0o777 == 0o600
    said: list[str] = []
    read(write(path, *[NO_ANSWER] * 12, GOOD), said, file=file)
    assert len(file.read_text().splitlines()) == 12, "the second start begins the list anew"
    assert said[-1] == f"{path}: 2 more rows cannot be used; all 12 are in {file}"


def test_bytes_that_are_no_text_come_back(tmp_path: Path) -> None:
    """A byte that is not UTF-8 is written as the surrogate that Python reads it as."""
    path, file = tmp_path / "rows.jsonl", tmp_path / "bad.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"prompt": "caf\xe9", "completion": "a"}')
    read(path, [], file=file)
    text = json.loads(file.read_text())["text"]
    assert text.encode(errors="surrogateescape") == path.read_bytes().splitlines()[1]


@pytest.mark.parametrize("row", KINDS)
def test_a_file_without_a_usable_row_lists_them_all_the_same(tmp_path: Path, row: str) -> None:
    """It ends with a sentence, but the list is what mends the file."""
    path, file = write(tmp_path / "rows.jsonl", row, row), tmp_path / "bad.jsonl"
    said: list[str] = []
    with raises(DataError, about=ABOUT.get(row, "rows")):
        read(path, said, file=file)
    assert [json.loads(line)["line"] for line in file.read_text().splitlines()] == [1, 2] == [1, len(said)]


@pytest.mark.parametrize("row", KINDS)
def test_the_first_one_is_fatal_where_that_is_wanted(tmp_path: Path, row: str) -> None:
    """By line, whichever kind it is."""
    path = write(tmp_path / "rows.jsonl", GOOD, row, row)
    with pytest.raises(DataError, match=rf"rows\.jsonl line 2: {re.escape(KINDS[row])}.*; correct the row"):
        read(path, [], fail=True)


def test_no_other_file_is_overwritten(tmp_path: Path) -> None:
    """Neither the data itself, given by mistake, nor a directory."""
    path = write(tmp_path / "rows.jsonl", GOOD, NO_ANSWER)
    for file, cause in ((path, None), (tmp_path, IsADirectoryError)):
        with raises(SettingsError, about="bad_rows", cause=cause):
            BadRows(report=print, file=file)
    assert path.read_text() == f"{GOOD}\n{NO_ANSWER}"


def test_a_full_disk_costs_a_sentence(tmp_path: Path) -> None:
    """The list is lost, the training is not."""
    path = write(tmp_path / "rows.jsonl", GOOD, NO_ANSWER)
    said: list[str] = []
    assert read(path, said, file=Path("/dev/full")).startswith("2 rows: 1 used")
    assert said[-1] == "--bad-rows /dev/full cannot be written (No space left on device); going on without it"
