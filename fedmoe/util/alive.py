"""A file by which a process shows that it is alive, for the health checks of containers (`fedmoe healthy`).

A thread writes it every BEAT_S seconds: `ROLE PID SECONDS`, whole seconds of the machine's monotonic clock. So it tells
that the process was neither killed nor stopped, and that its interpreter does not hang. It says nothing about Redis: a
process whose Redis is away waits for it, and restarting it would not help.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fedmoe.errors import NotAliveError, SettingsError
from fedmoe.util.setting import check, setting

BEAT_S = 5.0
LATE_S = 30.0  # six beats: a machine that is out of memory or CPU may miss some

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AliveSettings:
    """Where a process shows that it is alive."""

    alive_file: Path | None = setting(
        None, "File to write every five seconds while this process is alive, for `fedmoe healthy`.",
        metavar="FILE", variable="FEDMOE_ALIVE_FILE",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)


@contextmanager
def alive(file: Path | None, role: str) -> Iterator[None]:
    """Write the file until the block ends, then remove it; with None nothing is written.

    Raises:
        SettingsError: if the file cannot be written at the start. Later failures are logged once.
    """
    if file is None:
        yield
        return
    try:
        _write(file, role)
    except OSError as error:
        raise SettingsError(
            f"alive_file {file} cannot be written ({error.strerror}): name a file where this user may write",
            about="alive_file",
        ) from error
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(file, role, ended), name="alive file", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            file.unlink(missing_ok=True)


def _beat(file: Path, role: str, ended: threading.Event) -> None:
    complained = False
    while not ended.wait(BEAT_S):
        try:
            _write(file, role)
            complained = False
        except OSError as error:
            if not complained:
                logger.warning("the alive file %s cannot be written (%s)", file, error.strerror or error)
            complained = True


def _write(file: Path, role: str) -> None:
    """Replace the file in one step; it need not survive a crash of the machine, so there is no fsync."""
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    seconds = int(
        time.monotonic()
    )  # not rounded up: a reader would take a later time for that of an earlier start
    fresh.write_text(f"{role} {os.getpid()} {seconds}\n", encoding="ascii")
    fresh.replace(file)


def look(file: Path, *, now_s: float) -> str:
    """What the file says, as a sentence.

    Args:
        file: of the process.
        now_s: seconds of the machine's monotonic clock.

    Raises:
        NotAliveError: if the process has not written it lately.
        SettingsError: if it is no alive file.
    """
    try:
        content = file.read_bytes()[:200]
    except FileNotFoundError as error:
        raise NotAliveError(
            f"there is no {file}: the process has ended, or was started without --alive-file {file}",
            about="alive_file",
        ) from error
    except OSError as error:
        raise SettingsError(f"cannot read {file} ({error.strerror})", about="alive_file") from error
    try:
        role, pid, written = content.decode("ascii").split()
        who, age_s = f"{role} (pid {int(pid)})", now_s - float(written)
        if not role.isalpha():
            raise ValueError
    except ValueError as error:
        raise SettingsError(
            f"{file} is not written by fedmoe: name the file of --alive-file", about="alive_file"
        ) from error
    if not 0 <= age_s <= LATE_S:  # below 0: the machine was started again since
        last = f"for {age_s:.0f} s" if age_s > 0 else "since the machine started"
        raise NotAliveError(
            f"the {who} has not written {file} {last}: it was killed, is stopped, or hangs; restart it",
            about="alive_file",
        )
    return f"the {who} is alive: it wrote {file} {age_s:.0f} s ago"
