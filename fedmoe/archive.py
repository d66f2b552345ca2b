"""Applied updates, kept as files for whoever wants to recompute an expert: one file each, named by its digest.

Content-addressed, so that keeping one twice is harmless; written whole or not at all, and before the commit that
applies it, so that no line of an expert's log is without its file.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgpack

from fedmoe.disk import write_whole
from fedmoe.errors import SettingsError, UpdateError
from fedmoe.update import Header

SUFFIX = ".update"
WEIGHTS_SUFFIX = ".weights"
Buffer = bytes | memoryview


class Archive:
    """A directory of kept updates.

    Args:
        directory: made if it is not there.
        read_only: leave it alone, for whoever only reads.

    Raises:
        SettingsError: if it cannot be made or written.
    """

    def __init__(self, directory: Path, *, read_only: bool = False) -> None:
        self.directory = directory
        if read_only:
            return
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
        return self._write(msgpack.packb({"header": header.pack(), "parts": list(parts)}), SUFFIX)

    def keep_weights(self, file: Buffer) -> str:
        """Write an expert's weights, from which a replay can go on when the log before them was lost; their digest.

        Raises:
            OSError: if the disk is full or gone; nothing was written.
        """
        return self._write(file, WEIGHTS_SUFFIX)

    def _write(self, content: Buffer, suffix: str) -> str:
        digest = hashlib.sha256(content).hexdigest()
        file = self.directory / (digest + suffix)
        if not file.exists():
            write_whole(file, content)
        return digest

    def load(self, digest: str) -> tuple[Header, list[bytes]]:
        """The update of that digest.

        Raises:
            UpdateError: if it is not there, or not what its name says.
        """
        record = msgpack.unpackb(self._read(digest, SUFFIX, "update"))
        return Header.unpack(record["header"]), record["parts"]

    def load_weights(self, digest: str) -> bytes:
        """The weights of that digest, a safetensors file.

        Raises:
            UpdateError: if they are not there, or not what their name says.
        """
        return self._read(digest, WEIGHTS_SUFFIX, "weights")

    def _read(self, digest: str, suffix: str, what: str) -> bytes:
        try:
            content = (self.directory / (digest + suffix)).read_bytes()
        except OSError as error:
            raise UpdateError(
                f"the file of {what} {digest[:16]}… is not in {self.directory} ({error.strerror})"
            ) from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise UpdateError(f"the file of {what} {digest[:16]}… in {self.directory} is damaged")
        return content
