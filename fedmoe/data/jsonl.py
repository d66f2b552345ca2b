"""Reads the rows of a JSONL file: every usable row as its turns, and every other one by line and reason.

What may stand in the file is in `fedmoe.data.records`, what in a row is in `fedmoe.data.shapes`.
"""

import difflib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe.data.bad_rows import BadRows, Problem
from fedmoe.data.records import MAX_ROW_CHARS, Record, reading, records
from fedmoe.data.shapes import read_conversation
from fedmoe.data.turns import Turn
from fedmoe.errors import DataError, RowError, StoppedError
from fedmoe.text import shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One training row.

    Args:
        number, line: as in its record.
        turns: system, user, assistant and tool turns, at least two; the last is the assistant's.
        tools: JSON schemas of the functions that the assistant may call.
        unused: what it holds and no rule uses, such as a field's name.
    """

    line: int
    number: int = 0
    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A file that can be read and has a usable row.

    Args:
        digest: first 16 hex digits of the SHA-256 of its bytes.
        n_rows: good and bad ones.
    """

    path: Path
    digest: str
    n_rows: int


def open_data(
    path: str | Path, bad_rows: BadRows, *, stopped: Callable[[], bool] = lambda: False
) -> DataFile:
    """Look through `path`, before anything that takes long.

    Raises:
        DataError: if the file cannot be read or has no usable row, or at the first bad row if `bad_rows` says so.
        StoppedError: if `stopped` returns true; it is asked every so often.
    """
    path = Path(path)
    with reading(path):
        if not path.is_file():
            raise DataError(_why_no_file(path))
        with path.open("rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").hexdigest()[:16]
    n_rows, usable = 0, False
    problems: list[Problem] = []
    for record in records(path):
        if stopped():
            raise StoppedError("stopped while the rows were read: nothing was trained yet")
        n_rows += 1
        if not usable or bad_rows.fail:
            row = read_row(path, record)
            usable = usable or isinstance(row, Row)
            if isinstance(row, Problem):
                bad_rows.check(row)
                problems.append(row)
    if not n_rows:
        raise DataError(f"{shown(path)} has no rows: it is empty")
    if not usable:
        bad_rows.report(path, problems)
        bad = f"{n_rows} bad, the first in line {problems[0].line}: {problems[0].reason}"
        raise DataError(f"{shown(path)} has no usable row; {bad}")
    return DataFile(path=path, digest=digest, n_rows=n_rows)


def read_row(path: Path, record: Record) -> Row | Problem:
    """The row's turns, or why there are none."""
    try:
        read = read_conversation(_parse(record.text))
    except RowError as error:
        return Problem.of(error, path, record.number, record.line)
    return Row(number=record.number, line=record.line, turns=read.turns, tools=read.tools, unused=read.unused)


def _parse(text: str) -> object:
    if len(text) > MAX_ROW_CHARS:
        raise RowError(f"it is longer than {MAX_ROW_CHARS:,} characters")
    if "\0" in text:
        raise RowError("it holds NUL bytes; was the file cut off while it was written?")
    try:
        # Not strict: a raw tab inside a string is no JSON, but means only one thing.
        return json.JSONDecoder(strict=False, object_pairs_hook=_unique).decode(text)
    except RowError:
        raise
    except RecursionError:
        raise RowError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise RowError("it is not JSON", f": {error.msg} (character {error.pos + 1})") from None
    except ValueError:
        raise RowError("it holds a number of too many digits") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError("it has a field twice", f": its field {twice[:40]!r} stands there twice")
    return content


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        inside = ", ".join(sorted(entry.name for entry in path.glob("*.json*"))[:3])
        return f"{shown(path)} is a directory; name a file in it{inside and f', such as {shown(inside)}'}"
    if path.exists():
        return f"{shown(path)} is a pipe or a device, which cannot be read twice; write its content to a file"
    if not path.parent.is_dir():
        return f"there is no directory {shown(path.parent.absolute())}, so no file {shown(path.name)} in it"
    near = " or ".join(difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()]))
    return f"there is no file {shown(path.absolute())}{near and f'; did you mean {shown(near)}?'}"
