"""Encoded rows that are kept: taken if they are the same that would be made, and only then."""

import json
import os
import shutil
from pathlib import Path

import pytest

from fedmoe.data import cache, examples
from fedmoe.data.bad_rows import BadRows
from fedmoe.data.cache import FILE_NAME, RowCache, cache_key
from fedmoe.data.encode import Learn
from fedmoe.data.examples import Examples
from fedmoe.data.jsonl import open_data
from fedmoe.errors import DataError
from tests.tiny import tiny_tokenizer

ROWS = [
    {"messages": [{"role": role, "content": role} for role in ("user", "assistant") * 2]},
    {"prompt": "q", "completion": "a", "by": "Jos\u00e9"},
    {"prompt": "q", "completion": ""},
    {"prompt": "q" * 99, "completion": "a"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, *ROWS]) + "{")
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    directory.mkdir()
    return directory


def read(
    data: Path, state: Path, *, said: list[str] | None = None, max_length: int = 64, learn: Learn = "all",
    fail: bool = False, file: Path | None = None,
) -> Examples:  # fmt: skip
    said = [] if said is None else said
    bad_rows = BadRows(report=said.append, fail=fail, file=file)
    tokens = tiny_tokenizer()
    return RowCache(state, report=said.append).examples(
        open_data(data, bad_rows), tokens, max_length, bad_rows, learn=learn
    )


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Gets longer by one when the rows of a file are encoded."""
    made: list[None] = []
    encode_rows = examples.encode_rows

    def counted(*args: object, **options: object) -> object:
        made.append(None)
        return encode_rows(*args, **options)

    monkeypatch.setattr(examples, "encode_rows", counted)
    return made


def test_what_is_kept_is_on_disk(data: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before its name, its name at last."""
    synced, sync = [], os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    read(data, state)
    assert synced[-2:] == [(state / FILE_NAME).stat().st_ino, state.stat().st_ino]


def test_the_second_start_takes_what_the_first_one_made(
    data: Path, state: Path, encodings: list[None], tmp_path: Path
) -> None:
    """Examples and all that is told of the others, word for word, and the list of bad rows."""
    first: list[str] = []
    made = read(data, state, said=first, file=tmp_path / "first.jsonl")
    second: list[str] = []
    kept = read(data, state, said=second, file=tmp_path / "second.jsonl")
    assert (kept, kept.summary(), len(encodings)) == (made, made.summary(), 1)
    assert second[0] == f"{data}: taking the tokenized rows that are kept in {state / FILE_NAME}"
    assert second[1:] == first != []
    assert (tmp_path / "first.jsonl").read_bytes() == (tmp_path / "second.jsonl").read_bytes() != b""
    data.write_text(data.read_text().removesuffix("{"))
    read(data, state)
    with pytest.raises(DataError, match="line 3: its answer is empty"):
        read(data, state, fail=True)
    assert len(encodings) == 2


def test_only_the_owner_may_read_it(data: Path, state: Path) -> None:
    """The rows are private; and nothing half written stays."""
    read(data, state)
    assert [file.name for file in state.iterdir()] == [FILE_NAME]
    assert (state / FILE_NAME).stat().st_mode & 0o777 == 0o600


def test_whatever_the_encoding_depends_on_makes_it_another(
    data: Path, state: Path, encodings: list[None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Data, max_length, what is learnt, template, tokenizer, code."""
    read(data, state)
    read(data, state, max_length=63)
    read(data, state, max_length=63, learn="last")
    data.write_text(data.read_text() + "\n" + json.dumps(ROWS[1]))
    read(data, state, max_length=63, learn="last")
    assert len(encodings) == 4
    file = open_data(data, BadRows(report=print))
    tokenizer = tiny_tokenizer()

    def key() -> str:
        return cache_key(file, tokenizer, max_length=64, learn="all")

    keys = [key(), key()]
    tokenizer.chat_template += " "
    keys.append(key())
    tokenizer.add_tokens(["<extra>"])
    keys.append(key())
    tokenizer.add_special_tokens({"eos_token": "<extra>"})
    keys.append(key())
    code = tmp_path / "code"
    shutil.copytree(Path(cache.__file__).parent, code)
    monkeypatch.setattr(cache, "__file__", str(code / "cache.py"))
    keys.append(key())
    (code / "chat.py").write_text("")
    keys.append(key())
    assert [len(set(keys[:n])) for n in range(1, 8)] == [1, 1, 2, 3, 4, 4, 5]


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "foreign", "directory"])
def test_a_damaged_or_foreign_one_is_made_anew(
    data: Path, state: Path, encodings: list[None], damage: str
) -> None:
    """Whatever lies there under its name; afterwards it is whole again, if it can be."""
    made = read(data, state)
    file = state / FILE_NAME
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    wrong = {"empty": b"", "cut": bytes(content[:-8]), "changed": bytes(content), "foreign": b"PK\x03\x04"}
    if damage == "directory":
        file.unlink()
        (file / "inside").mkdir(parents=True)
    else:
        file.write_bytes(wrong[damage])
    said: list[str] = []
    assert read(data, state, said=said) == made
    assert len(encodings) == 2
    assert ("the next start tokenizes the rows again" in said[-1]) is (damage == "directory")
    assert read(data, state) == made
    assert len(encodings) == (3 if damage == "directory" else 2)


def test_a_disk_that_takes_nothing_costs_a_sentence(
    data: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are there all the same."""

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    said: list[str] = []
    assert len(read(data, state, said=said).examples) == 4
    assert said[-1].startswith("cannot write ")
    assert said[-1].endswith(" (No space left on device): the next start tokenizes the rows again")
    assert list(state.iterdir()) == []
