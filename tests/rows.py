"""JSONL files for tests, and what is read from them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from fedmoe.data import records
from fedmoe.data.bad_rows import BadRows, Problem
from fedmoe.data.jsonl import DataFile, Row, open_data, read_row

Message = dict[str, Any]


GOOD = {"prompt": "q", "completion": "a"}


def write(tmp_path: Path, content: bytes | str, name: str = "rows.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows: Any, ensure_ascii: bool = True) -> str:
    return "".join(json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows)


class Read(NamedTuple):
    data: DataFile
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]


def read_rows(path: Path | str, *, fail: bool = False) -> Read:
    data = open_data(path, BadRows(report=print, fail=fail))
    made = [read_row(data.path, record) for record in records.records(data.path)]
    rows = tuple(row for row in made if isinstance(row, Row))
    return Read(data, rows, tuple(problem for problem in made if isinstance(problem, Problem)))


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(row: Row) -> list[Message]:
    """The row's turns, as OpenAI's format would write them."""
    return [{"role": turn.role, "content": turn.content} for turn in row.turns]


SYSTEM = {"role": "system", "content": "s"}


ANSWER = {"role": "assistant", "content": "a"}
