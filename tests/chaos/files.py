"""The files of a run's Redis: their last second is cut off, or an older copy of them takes their place."""

import os
import random
import shutil
from contextlib import suppress
from pathlib import Path

COPY_EVERY_S = 2.0
OLDEST_S = 30.0  # of a copy that is brought back; workers keep what was decided in the last 60 s


class RedisFiles:
    """The append-only files in a server's directory.

    Args:
        directory: of the server.
        copies: where copies are kept.
    """

    def __init__(self, directory: Path, copies: Path) -> None:
        self._live = directory / "appendonlydir"
        self._copies = copies
        self._sizes: list[tuple[float, int]] = []  # of the file that is appended to, in the last second
        self._copied: list[tuple[float, Path]] = []

    def note(self, now: float) -> None:
        """Take note of the present size, and every other second a copy."""
        self._sizes = [(at, size) for at, size in self._sizes if now - at < 1.0]
        with suppress(FileNotFoundError):
            self._sizes.append((now, self._appended().stat().st_size))
        if not self._copied or now - self._copied[-1][0] > COPY_EVERY_S:
            self._copy(now)

    def _copy(self, now: float) -> None:
        for at, path in list(self._copied):
            if now - at > OLDEST_S:
                shutil.rmtree(path)
                self._copied.remove((at, path))
        target = self._copies / f"{now:.3f}"
        try:  # while Redis rewrites its file, one that the manifest names may be gone
            shutil.copytree(self._live, target)
        except (shutil.Error, OSError):
            shutil.rmtree(target, ignore_errors=True)
            return
        self._copied.append((now, target))

    def _appended(self) -> Path:
        """The file that Redis appends to; the one before it goes away while it is rewritten."""
        found: list[tuple[float, Path]] = []
        for file in self._live.glob("*.incr.aof"):
            with suppress(FileNotFoundError):
                found.append((file.stat().st_mtime, file))
        return max(found)[1]

    def cut(self, dice: random.Random) -> int:
        """Cut off some of what was written in the last second, of a server that is dead; how many bytes."""
        if not self._sizes:
            return 0
        file = self._appended()
        oldest, size = self._sizes[0][1], file.stat().st_size
        end = dice.randint(min(oldest, size), size)
        os.truncate(file, end)
        _drop_torn_transaction(file)
        return size - end

    def bring_back(self, dice: random.Random, now: float) -> float:
        """Put one of the copies in place of the files of a dead server; its age in seconds, 0 if there is none."""
        if not self._copied:
            return 0.0
        at, copy = dice.choice(self._copied)
        shutil.rmtree(self._live)
        shutil.copytree(copy, self._live)
        _drop_torn_transaction(self._appended())
        for later, path in [one for one in self._copied if one[0] > at]:  # of a future that is gone
            shutil.rmtree(path)
            self._copied.remove((later, path))
        self._sizes = []
        return now - at


def _drop_torn_transaction(aof: Path) -> None:
    """What `redis-check-aof --fix` does, and Redis itself does not (Valkey does since 9.1).

    Of a transaction that is cut in the middle it drops the last command only, and executes the others after the
    restart after next.
    """
    content = aof.read_bytes()
    begun = content.rfind(b"*1\r\n$5\r\nMULTI\r\n")
    if begun > content.rfind(b"*1\r\n$4\r\nEXEC\r\n"):
        os.truncate(aof, begun)
