"""Writes files with secrets: readable by their owner alone from the first byte on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

from fedmoe.enrolment import Enrolment
from fedmoe.errors import SettingsError
from fedmoe.protocol.parties import Party


def write_private(path: Path, text: str, *, replace: bool = False) -> None:
    """Write a file of mode 600; a reader sees the old one or the new one, never a part.

    Raises:
        SettingsError: if the file is there and shall not be replaced, or cannot be written.
    """
    with private_file(path, text, replace=replace):
        pass


@contextmanager
def private_file(path: Path, text: str, *, replace: bool = False) -> Iterator[None]:
    """The same, but the file appears when the block has ended; after an error in the block, nothing has changed.

    Raises:
        SettingsError: as above, nearly always before the block.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        if not replace and path.exists():
            raise FileExistsError
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise _not_written(path, error) from error
    try:
        yield
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
    try:
        new.rename(path)
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> SettingsError:
    if isinstance(error, FileExistsError):
        return SettingsError(
            f"there is {str(path)!r} already: name another file, or move it away", about="out"
        )
    return SettingsError(f"cannot write {str(path)!r}: {error.strerror}", about="out")


def enrolment_text(enrolled: Enrolment, party: Party) -> str:
    """The content of an enrolment file."""
    lines = [f"# {str(party).capitalize()}. This file holds a password: keep it to yourself."]
    for one in fields(enrolled):
        value = getattr(enrolled, one.name)
        if value and isinstance(value, str):
            lines.append(f"{one.name} = {_quoted(value)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    if "\n" in text:  # a certificate
        return f"'''\n{text.strip()}\n'''"
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
