"""Reads a JSONL file and its common variants: the text of every row, with its line.

The format is one JSON object per line. Also accepted: UTF-8 and UTF-16 with or without a byte order mark, any line end,
blank lines, a comma after the object, gzip, one JSON array of rows, objects over several lines. The encoding of bytes
that are not UTF-8 is never guessed, because the model would learn the guess.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO, cast

from fedmoe.errors import DataError
from fedmoe.util.text import shown

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


class Record(NamedTuple):
    """One row as it is in the file, good or bad.

    Args:
        number: index of the row in the file, from 0; two rows in one line have different numbers.
        line: line at which the row begins, from 1.
        text: the JSON of the row, as it was written.
    """

    number: int
    line: int
    text: str


def records(path: Path) -> Iterator[Record]:
    """Every row of the file as text.

    Raises:
        DataError: if the file cannot be read.
    """
    with reading(path), path.open("rb") as raw, _decoded(raw, path) as file:
        for number, (line, text) in enumerate(_texts(file)):
            yield Record(number, line, text)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any error in reading the file into a DataError."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"cannot read {shown(path)}: {getattr(error, 'strerror', None) or error}", about="file"
        ) from error


def _decoded(raw: BinaryIO, path: Path) -> TextIO:
    """The file's text, decompressed if necessary, with every line end as a newline."""
    raw.seek(0)
    packed = raw.read(2) == GZIP_MAGIC
    raw.seek(0)
    stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
    beginning = stream.read(32)
    stream.seek(0)
    for magic, what in FOREIGN.items():
        if beginning.startswith(magic):
            raise DataError(f"{shown(path)} is {what}", about="format")
    # A file of NUL bytes only (a crash may leave one) is not UTF-32.
    encoding = json.detect_encoding(beginning) if beginning.strip(b"\0") else "utf-8"
    # Bad bytes become surrogates, so that only their own row is refused, by fedmoe.data.turns.
    errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
    return io.TextIOWrapper(stream, encoding=encoding, errors=errors)


def _texts(file: TextIO) -> Iterator[tuple[int, str]]:
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
    """Numbered lines, each truncated after MAX_ROW_CHARS + 1 characters, so that no file can fill the memory."""
    number = 0
    while line := file.readline(MAX_ROW_CHARS + 1):
        number += 1
        yield number, line
        while len(line) > MAX_ROW_CHARS and not line.endswith("\n"):
            line = file.readline(MAX_ROW_CHARS + 1)


def _split_document(text: str, line: int) -> Iterator[tuple[int, str]]:
    """The rows of one JSON array, or of objects over several lines; `line` is the first line of the text."""
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
