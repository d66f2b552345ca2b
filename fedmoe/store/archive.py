"""Applied updates, kept as files so that an expert can be recomputed: one file per update, named by its digest.

Files are content-addressed, so keeping an update twice is harmless. A file is written atomically, before the commit
that applies its update, so every line of an expert's log has its file.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgpack

from fedmoe.errors import ProtocolError, SettingsError, UpdateError
from fedmoe.protocol.fields import known_fields
from fedmoe.protocol.update import ForeignHeaderError, Header
from fedmoe.util.disk import write_whole

SUFFIX = ".update"
WEIGHTS_SUFFIX = ".weights"
ANCHOR_SUFFIX = ".anchor"
Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """A version of an expert whose weights are kept, so that a replay can begin there.

    Args:
        version, lineage: of the expert.
        run, seq: of the update that made this version.
        weights: digest of the kept weights.
        server_state: digest of the kept server state, "" if there was none; optimizer: to which it belongs.
        at: when they were kept (seconds since 1970).
    """

    version: int
    lineage: str
    run: str
    seq: int
    weights: str
    at: float
    server_state: str = ""
    optimizer: str = ""


class Archive:
    """A directory of kept updates.

    Args:
        directory: created if it is missing.
        read_only: neither create nor test the directory.

    Raises:
        SettingsError: if the directory cannot be created or written.
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
                f"updates cannot be kept in {directory} ({error.strerror}): give --keep-updates another directory",
                about="keep_updates",
            ) from error

    def keep(self, header: Header, parts: Sequence[bytes]) -> str:
        """Write an update; returns its digest (64 hex digits).

        Raises:
            OSError: if the disk is full or gone; nothing was written.
        """
        return self._write(msgpack.packb({"header": header.pack(), "parts": list(parts)}), SUFFIX)

    def drop_all_but(self, digests: Collection[str]) -> None:
        """Remove every file except the updates with these digests; for a directory with one writer.

        Raises:
            OSError: if the disk is gone; the updates with these digests stay.
        """
        wanted = {digest + SUFFIX for digest in digests}
        for file in self.directory.iterdir():
            if file.name not in wanted:
                file.unlink(missing_ok=True)

    def keep_weights(self, file: Buffer) -> str:
        """Write weights or a server state, for a replay that cannot start at version 0; returns their digest.

        Raises:
            OSError: if the disk is full or gone; nothing was written.
        """
        return self._write(file, WEIGHTS_SUFFIX)

    def _write(self, content: Buffer, suffix: str) -> str:
        digest = hashlib.sha256(content).hexdigest()
        file = self.directory / (digest + suffix)
        if file.exists():
            os.utime(file)  # restarts its retention period
        else:
            write_whole(file, content)
        return digest

    def keep_anchor(self, anchor: Anchor) -> None:
        """Write an anchor whose weights are already kept.

        Raises:
            OSError: if the disk is full or gone; nothing was written.
        """
        name = f"{anchor.version:012}-{anchor.weights[:16]}{ANCHOR_SUFFIX}"
        write_whole(self.directory / name, json.dumps(asdict(anchor)).encode())

    def anchors(self) -> dict[Path, Anchor]:
        """The anchors by file, oldest first; damaged anchors are left out."""
        found = {}
        for file in self.directory.glob("*" + ANCHOR_SUFFIX):
            try:
                found[file] = Anchor(**known_fields(Anchor, json.loads(file.read_bytes())))
            except (OSError, ValueError, TypeError, AttributeError):
                continue
        return dict(sorted(found.items(), key=lambda item: (item[1].at, item[1].version)))

    def kept_before(self, time: float) -> Iterator[Path]:
        """Updates, weights and half-written files last used before `time` (seconds since 1970)."""
        with os.scandir(self.directory) as entries:
            for entry in entries:
                is_ours = entry.name.endswith((SUFFIX, WEIGHTS_SUFFIX)) or entry.name.startswith(".")
                if is_ours and entry.stat(follow_symlinks=False).st_mtime < time:
                    yield Path(entry.path)

    def holds(self, digest: str) -> bool:
        """True if the update with that digest is kept."""
        return bool(digest) and (self.directory / (digest + SUFFIX)).is_file()

    def holds_weights(self, digest: str) -> bool:
        """True if the weights with that digest are kept."""
        return bool(digest) and (self.directory / (digest + WEIGHTS_SUFFIX)).is_file()

    def load(self, digest: str) -> tuple[Header, list[bytes]]:
        """The update with that digest.

        Raises:
            ProtocolError: if it needs a feature that this FedMoE does not know.
            UpdateError: if its file is missing or damaged.
        """
        record = msgpack.unpackb(self._read(digest, SUFFIX, "update"))
        try:
            return Header.unpack(record["header"]), record["parts"]
        except ForeignHeaderError as error:
            raise ProtocolError(
                f"the update {digest[:16]}… in {self.directory} needs {error.needs}, which the FedMoE on this machine "
                "does not know: upgrade the FedMoE on this machine",
                about="requires",
            ) from error

    def load_weights(self, digest: str) -> bytes:
        """The weights or the server state with that digest, a safetensors file.

        Raises:
            UpdateError: if their file is missing or damaged.
        """
        return self._read(digest, WEIGHTS_SUFFIX, "weights")

    def _read(self, digest: str, suffix: str, what: str) -> bytes:
        try:
            content = (self.directory / (digest + suffix)).read_bytes()
        except OSError as error:
            raise UpdateError(
                f"the file of {what} {digest[:16]}… is not in {self.directory} ({error.strerror})", about=what
            ) from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise UpdateError(f"the file of {what} {digest[:16]}… in {self.directory} is damaged", about=what)
        return content
