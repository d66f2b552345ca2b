"""One name runs once at a time: a second process with a live heartbeat of the same name is refused.

Clocks of different machines are not compared: a heartbeat is alive if it beats while one watches.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable

from fedmoe.errors import NameTakenError, StoppedError
from fedmoe.store.worker import WorkerStore

logger = logging.getLogger(__name__)


def claim_name(
    store: WorkerStore,
    *,
    patience_s: float,
    stop: threading.Event,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Return when the name is free: no heartbeat, or one whose process is gone, or that stands still for patience_s.

    Raises:
        NameTakenError: if the heartbeat beats.
        StoppedError: if told to stop meanwhile.
    """
    first = store.heartbeat()
    if not first or _is_dead_here(first):
        return
    who = f"pid {first.get('pid', '?')} on {first.get('host', '?')}"
    logger.warning(
        "a worker named %r (%s) was alive a moment ago; watching up to %.0f s whether it still is",
        store.worker, who, patience_s,
    )  # fmt: skip
    until = clock() + patience_s
    while clock() < until:
        if stop.wait(0.25):
            raise StoppedError("stopped before it had joined")
        beat = store.heartbeat()
        if not beat:
            return
        if beat.get("beat") != first.get("beat") or beat.get("run") != first.get("run"):
            raise NameTakenError(
                f"a worker named {store.worker!r} is running ({who}): stop it first, or give this one another --name"
            )


def _is_dead_here(beat: dict[str, str]) -> bool:
    """True if the heartbeat is of a process of this machine that no longer exists."""
    pid = beat.get("pid", "")
    if beat.get("host") != socket.gethostname() or not pid.isdecimal():
        return False
    if int(pid) == os.getpid():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
