"""Reads the rows of a JSONL file: a usable row as its turns, any other row as a problem with line and reason.

`fedmoe.data.records` describes the accepted files, `fedmoe.data.shapes` the accepted rows.
"""

import difflib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe.data.bad_rows import BadRows, Problem
from fedmoe.data.records import GZIP_MAGIC, MAX_ROW_CHARS, Record, reading, records
from fedmoe.data.shapes import read_conversation
from fedmoe.data.turns import Turn
from fedmoe.errors import DataError, RowError, StoppedError
from fedmoe.util.text import shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One training row.

    Args:
        number, line: as in the record.
        turns: system, user, assistant and tool turns, at least two; the last is the assistant's.
        tools: JSON schemas of the functions that the assistant may call.
        unused: parts of the row that no rule uses, such as a field's name.
        source: what the row names as its source, "" if it names none.
    """

    line: int
    number: int = 0
    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()
    unused: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """A readable file with at least one usable row.

    Args:
        digest: first 16 hex digits of the SHA-256 of its bytes.
        n_lines: number of lines, about that of rows unless the file is one JSON array; 0 for a gzip file.
        state: file attributes that change when somebody writes to the file.
    """

    path: Path
    digest: str
    n_lines: int
    state: tuple[int, ...]

    def check_unchanged(self) -> None:
        """Check that the file still has the content of the digest.

        Raises:
            DataError: if somebody has written to the file.
        """
        with reading(self.path):
            if _state(self.path) != self.state:
                raise DataError(
                    f"{shown(self.path)} was changed while it was read: start again", about="change"
                )


def open_data(
    path: str | Path, bad_rows: BadRows, *, stopped: Callable[[], bool] = lambda: False
) -> DataFile:
    """Check early that `path` can be used: up to its first usable row, or all of it if bad rows are fatal.

    Raises:
        DataError: if the file cannot be read or has no usable row, or at a bad row if bad rows are fatal.
        StoppedError: if `stopped`, which is called repeatedly, returns True.
    """
    path = Path(path)
    with reading(path):
        if not path.is_file():
            raise _no_file(path)
        state = _state(path)
        digest, n_lines = _digest(path, stopped)
    usable = False
    problems: list[Problem] = []
    for record in records(path):
        _check(stopped)
        row = read_row(path, record)
        if isinstance(row, Problem):
            bad_rows.check(row)
            problems.append(row)
        else:
            usable = True
            if not bad_rows.fail:
                break
    if not usable and not problems:
        raise DataError(f"{shown(path)} has no rows: it is empty", about="rows")
    if not usable:
        bad_rows.report(path, problems)
        bad = f"{len(problems)} bad, the first in line {problems[0].line}: {problems[0].reason}"
        raise DataError(f"{shown(path)} has no usable row; {bad}", about=problems[0].about)
    return DataFile(path=path, digest=digest, n_lines=n_lines, state=state)


def _check(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise StoppedError("stopped while the rows were read: nothing was trained yet", about="rows")


def _state(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _digest(path: Path, stopped: Callable[[], bool]) -> tuple[str, int]:
    """The digest of the bytes, and the number of line feeds; 0 for a gzip file."""
    digest = hashlib.sha256()
    n_lines = 0
    packed = False
    with path.open("rb") as raw:
        while block := raw.read(2**20):
            _check(stopped)
            packed = packed or (raw.tell() == len(block) and block.startswith(GZIP_MAGIC))
            digest.update(block)
            n_lines += block.count(b"\n")
    return digest.hexdigest()[:16], 0 if packed else n_lines


def read_row(path: Path, record: Record) -> Row | Problem:
    """Return the row's turns, or the problem if it has none."""
    try:
        read = read_conversation(_parse(record.text))
    except RowError as error:
        return Problem.of(error, path, record.number, record.line)
    return Row(
        number=record.number,
        line=record.line,
        turns=read.turns,
        tools=read.tools,
        unused=read.unused,
        source=read.source,
    )


def _parse(text: str) -> object:
    if len(text) > MAX_ROW_CHARS:
        raise RowError(f"it is longer than {MAX_ROW_CHARS:,} characters", about="length")
    if "\0" in text:
        raise RowError("it holds NUL bytes; was the file cut off while it was written?", about="NUL")
    try:
        # Not strict: a raw tab inside a string is not JSON, but it is unambiguous.
        return json.JSONDecoder(strict=False, object_pairs_hook=_unique).decode(text)
    except RowError:
        raise
    except RecursionError:
        raise RowError("it is nested too deeply", about="nesting") from None
    except json.JSONDecodeError as error:
        raise RowError("it is not JSON", f": {error.msg} (character {error.pos + 1})", about="JSON") from None
    except ValueError:
        raise RowError("it holds a number of too many digits", about="number") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError("it has a field twice", f": {twice[:40]!r}", about="field")
    return content


def _no_file(path: Path) -> DataError:
    if path.is_dir():
        inside = ", ".join(sorted(entry.name for entry in path.glob("*.json*"))[:3])
        named = inside and f", such as {shown(inside)}"
        return DataError(f"{shown(path)} is a directory; name a file in it{named}", about="directory")
    if path.exists():
        return DataError(
            f"{shown(path)} is a pipe or a device, which cannot be read twice; write its content to a file",
            about="pipe",
        )
    if not path.parent.is_dir():
        return DataError(
            f"there is no directory {shown(path.parent.absolute())}, so no file {shown(path.name)} in it",
            about="parent",
        )
    near = " or ".join(difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()]))
    meant = near and f"; did you mean {shown(near)}?"
    return DataError(f"there is no file {shown(path.absolute())}{meant}", about="file")
