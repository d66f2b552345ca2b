"""Reads a JSONL file as people have it: every usable row, and every other one by line and reason.

One JSON object a line, in any shape of `fedmoe.data.shapes`. Also taken: UTF-8 and UTF-16 with or without a
byte order mark, any line end, blank lines, a comma after the object, gzip, one JSON array of rows, objects
over several lines. Bytes that are not UTF-8 are never guessed at: the model would learn the guess.
"""

import difflib
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, cast

from fedmoe.data.shapes import Message, split_answer
from fedmoe.errors import DataError, StoppedError

__all__ = ["Message", "Problem", "Row", "Rows", "read_rows"]

MAX_ROW_CHARS = 4 * 2**20
GZIP_MAGIC = b"\x1f\x8b"
FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer, not the data: run git lfs pull",
    b"PAR1": "a Parquet file: convert it to JSONL",
    b"ARROW1": "an Arrow file: convert it to JSONL",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it or save it as JSONL",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first",
    b"\xfd7zXZ": "compressed with xz: unpack it first",
    b"BZh": "compressed with bzip2: unpack it first",
}
_BETWEEN_ROWS = re.compile(r"[\s,\[\]\ufeff]*")
_NEXT_ROW = re.compile(r"[\n,]\s*\{")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One training row: the turns before the answer, and the answer that the loss is on.

    Args:
        line: where it begins in the file, from 1.
        prompt: everything before the answer: system, user, assistant and tool turns.
        completion: text of the assistant's last turn.
    """

    line: int
    prompt: tuple[Message, ...]
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why one row cannot be used."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{_show(self.path)} line {self.line}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What a file holds; `digest` is the first 16 hex digits of its bytes' SHA-256."""

    path: Path
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    digest: str


def read_rows(
    path: str | Path,
    *,
    on_bad_row: Literal["skip", "fail"] = "skip",
    stopped: Callable[[], bool] = lambda: False,
) -> Rows:
    """Read every row of `path`.

    Raises:
        DataError: if the file cannot be read or has no usable row, or at the first bad row with "fail".
        StoppedError: if `stopped` returns true; it is asked every so often.
    """
    path = Path(path)
    rows: list[Row] = []
    problems: list[Problem] = []
    try:
        if not path.is_file():
            raise DataError(_why_no_file(path))
        with path.open("rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").hexdigest()[:16]
            with _decoded(raw, path) as file:
                for line, text in _records(file):
                    if stopped():
                        raise StoppedError("stopped while the rows were read: nothing was trained yet")
                    try:
                        prompt, completion = split_answer(_parse(text))
                        rows.append(Row(line=line, prompt=prompt, completion=completion))
                    except DataError as error:
                        problems.append(Problem(path=path, line=line, reason=str(error)))
                        if on_bad_row == "fail":
                            raise DataError(f"{problems[0]}; mend it, or have bad rows skipped") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {_show(path)}: {getattr(error, 'strerror', None) or error}") from error
    if not rows and not problems:
        raise DataError(f"{_show(path)} has no rows: it is empty")
    if not rows:
        bad = f"{len(problems)} bad, the first in line {problems[0].line}: {problems[0].reason}"
        raise DataError(f"{_show(path)} has no usable row; {bad}")
    return Rows(path=path, rows=tuple(rows), problems=tuple(problems), digest=digest)


def _decoded(raw: BinaryIO, path: Path) -> TextIO:
    """The file's text, unpacked if need be, with every line end as a newline."""
    raw.seek(0)
    packed = raw.read(2) == GZIP_MAGIC
    raw.seek(0)
    stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
    head = stream.read(32)
    stream.seek(0)
    for magic, what in FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"{_show(path)} is {what}")
    # A file of nothing but NUL bytes (a crash does that) is no UTF-32.
    encoding = json.detect_encoding(head) if head.strip(b"\0") else "utf-8"
    # Bad bytes become surrogates, so that they spoil their own row only; fedmoe.data.shapes finds them.
    errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
    return io.TextIOWrapper(stream, encoding=encoding, errors=errors)


def _records(file: TextIO) -> Iterator[tuple[int, str]]:
    """(line, JSON text) of every row, good or bad."""
    started = False
    for number, line in _lines(file):
        text = line.strip().removeprefix("\ufeff")
        if not started and (text.startswith("[") or text == "{"):
            yield from _split_document(line + file.read(), number)
            return
        if text:
            started = True
            yield number, text.removesuffix(",")


def _lines(file: TextIO) -> Iterator[tuple[int, str]]:
    """Numbered lines, each cut after MAX_ROW_CHARS + 1 characters, so that no file can fill the memory."""
    number = 0
    while line := file.readline(MAX_ROW_CHARS + 1):
        number += 1
        yield number, line
        while len(line) > MAX_ROW_CHARS and not line.endswith("\n"):
            line = file.readline(MAX_ROW_CHARS + 1)


def _split_document(text: str, line: int) -> Iterator[tuple[int, str]]:
    """The rows of one JSON array, or of objects printed over several lines; `line` is the text's first."""
    decoder = json.JSONDecoder(strict=False)
    position = 0
    while True:
        begin = cast("re.Match[str]", _BETWEEN_ROWS.match(text, position)).end()
        line += text.count("\n", position, begin)
        if begin == len(text):
            return
        try:
            _, position = decoder.raw_decode(text, begin)
            yield line, text[begin:position]
        except (ValueError, RecursionError):
            following = _NEXT_ROW.search(text, begin)
            position = following.start() if following else len(text)
            yield line, text[begin : min(position, begin + MAX_ROW_CHARS)]
        line += text.count("\n", begin, position)


def _parse(text: str) -> object:
    if len(text) > MAX_ROW_CHARS:
        raise DataError(f"it is longer than {MAX_ROW_CHARS:,} characters")
    if "\0" in text:
        raise DataError("it holds NUL bytes; was the file cut off while it was written?")
    try:
        # Not strict: a raw tab inside a string is no JSON, but means only one thing.
        return json.JSONDecoder(strict=False, object_pairs_hook=_unique).decode(text)
    except DataError:
        raise
    except RecursionError:
        raise DataError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise DataError(f"it is not JSON: {error.msg} (character {error.pos + 1})") from None
    except ValueError:
        raise DataError("it holds a number of too many digits") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"its field {twice[:40]!r} stands there twice")
    return content


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        inside = ", ".join(sorted(entry.name for entry in path.glob("*.json*"))[:3])
        return f"{_show(path)} is a directory; name a file in it{inside and f', such as {_show(inside)}'}"
    if path.exists():
        return f"{_show(path)} is a pipe or a device, which cannot be read twice; write its content to a file"
    if not path.parent.is_dir():
        return f"there is no directory {_show(path.parent.absolute())}, so no file {_show(path.name)} in it"
    near = " or ".join(difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()]))
    return f"there is no file {_show(path.absolute())}{near and f'; did you mean {_show(near)}?'}"


def _show(name: Path | str) -> str:
    """A path as printable text: file names may be any bytes."""
    return str(name).encode(errors="backslashreplace").decode()
