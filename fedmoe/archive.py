"""Applied updates, kept as files for whoever wants to recompute an expert: one file each, named by its digest.

Content-addressed, so that keeping one twice is harmless; written whole or not at all, and before the commit that
applies it, so that no line of an expert's log is without its file.
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgpack

from fedmoe.errors import SettingsError, UpdateError
from fedmoe.update import Header

SUFFIX = ".update"


class Archive:
    """A directory of kept updates.

    Raises:
        SettingsError: if it cannot be made or written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise SettingsError(
                f"updates cannot be kept in {directory} ({error.strerror}): give --keep-updates another directory"
            ) from error

    def keep(self, header: Header, parts: Sequence[bytes]) -> str:
        """Write an update; returns its digest (64 hex digits).

        Raises:
            OSError: if the disk is full or gone; nothing was written.
        """
        content = msgpack.packb({"header": header.pack(), "parts": list(parts)})
        digest = hashlib.sha256(content).hexdigest()
        file = self.directory / (digest + SUFFIX)
        if not file.exists():
            fresh = file.with_suffix(f".{os.getpid()}")
            try:
                with fresh.open("wb") as out:
                    out.write(content)
                    out.flush()
                    os.fsync(out.fileno())
                fresh.replace(file)
            finally:
                fresh.unlink(missing_ok=True)
        return digest

    def load(self, digest: str) -> tuple[Header, list[bytes]]:
        """The update of that digest.

        Raises:
            UpdateError: if it is not there, or not what its name says.
        """
        try:
            content = (self.directory / (digest + SUFFIX)).read_bytes()
        except OSError as error:
            raise UpdateError(
                f"the update {digest[:16]}… is not in {self.directory} ({error.strerror})"
            ) from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise UpdateError(f"the file of update {digest[:16]}… in {self.directory} is damaged")
        record = msgpack.unpackb(content)
        return Header.unpack(record["header"]), record["parts"]
