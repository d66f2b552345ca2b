"""Reports rows that cannot be used, by file, line and reason, and lists them in a file on request."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmoe.data.records import records
from fedmoe.errors import DataError, RowError, SettingsError
from fedmoe.util.text import shown

N_NAMED = 10  # reported rows of each data file
FIELDS = ("file", "line", "reason", "text")  # of each line in the file of --bad-rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why one row cannot be used.

    Args:
        number: index of the row in the file, from 0; line: where the row begins, from 1.
        reason: a clause about "it", the row. kind: the reason without details of the row.
        about: the same as a word for programs, as in FedMoEError.
    """

    path: Path
    number: int
    line: int
    kind: str
    reason: str
    about: str

    @classmethod
    def of(cls, error: RowError, path: Path, number: int, line: int) -> "Problem":
        """Make a problem of the error that a row raised."""
        return cls(path=path, number=number, line=line, kind=error.kind, reason=str(error), about=error.about)

    def __str__(self) -> str:
        return f"{shown(self.path)} line {self.line}: {self.reason}"


class BadRows:
    """Handles rows that cannot be used.

    Args:
        report: prints a line for people.
        file: receives all bad rows, one JSON object per line: file, line, reason, text. Rows are private, so only
            the file's owner may read it.
        fail: raise an error at the first bad row.

    Raises:
        SettingsError: if `file` cannot be written, or has other content.
    """

    def __init__(
        self, *, report: Callable[[str], None], file: Path | None = None, fail: bool = False
    ) -> None:
        self.fail = fail
        self._report = report
        self._file = file
        if file:
            _create(file)

    def check(self, problem: Problem) -> None:
        """Raise an error for the problem if bad rows are fatal.

        Raises:
            DataError: if bad rows are fatal.
        """
        if self.fail:
            raise DataError(f"{problem}; correct the row, or give --on-bad-row skip", about=problem.about)

    def report(self, path: Path, problems: Sequence[Problem]) -> None:
        """Report the first N_NAMED bad rows of the data file `path`, and write all of them to the file."""
        for problem in problems[:N_NAMED]:
            self._report(str(problem))
        more = len(problems) - N_NAMED
        if more > 0:
            n = len(problems)
            where = (
                f"all {n} are in {shown(self._file)}"
                if self._file
                else f"give --bad-rows FILE for a list of all {n}"
            )
            self._report(f"{shown(path)}: {more} more rows cannot be used; {where}")
        if problems and self._file:
            self._write(self._file, path, {problem.number: problem for problem in problems})

    def _write(self, file: Path, path: Path, problems: dict[int, Problem]) -> None:
        try:
            with file.open("a", encoding="utf-8") as opened:
                for number, line, text in records(path):
                    if problem := problems.get(number):
                        row = (shown(path), line, problem.reason, text)
                        opened.write(json.dumps(dict(zip(FIELDS, row, strict=True))) + "\n")
        except OSError as error:
            self._report(f"--bad-rows {file} cannot be written ({error.strerror}); going on without it")
            self._file = None


def _create(file: Path) -> None:
    """Create an empty file; never overwrite a file with other content, which could be the data."""
    try:
        if file.is_file() and not _is_ours(file):
            raise SettingsError(
                f"--bad-rows {file} holds something else already: choose a new file", about="bad_rows"
            )
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    except OSError as error:
        raise SettingsError(
            f"--bad-rows {file} cannot be written ({error.strerror}): choose a file in a directory you may write to",
            about="bad_rows",
        ) from error


def _is_ours(file: Path) -> bool:
    with file.open("rb") as opened:
        line = opened.readline()
    try:
        return not line or list(json.loads(line)) == list(FIELDS)
    except (ValueError, TypeError, RecursionError):
        return False
