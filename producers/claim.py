"""One process per worker name: a worker is refused while another process with its name has a live heartbeat.

Clocks of different machines are not compared: a heartbeat is live if it changes while it is watched. Host name and
process id identify no process, because two containers may share both. The id of the state directory does, because
only one process at a time can lock that directory.
"""

import logging
import threading
import time
from collections.abc import Callable

from fedmoe.errors import NameTakenError, StoppedError
from fedmoe.protocol.beat import Beat
from fedmoe.store.worker import WorkerStore

logger = logging.getLogger(__name__)

JOINING = "joining"  # `run` of a heartbeat until the training begins
LATEST_S = 10**11  # seconds since 1970; a later time is not believable
JOIN_TTL_S = 60.0  # of the joining heartbeat, which is written once; attaching the adapter takes time


def claim_name(
    store: WorkerStore,
    *,
    state_id: str,
    patience_s: float,
    stop: threading.Event,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Return when the name is free: there is no heartbeat, or this worker's predecessor left it, or it stands still.

    A heartbeat with the id of this worker's state directory (`state_id`, "" without one) is its predecessor's. Any
    other heartbeat must stay unchanged for `patience_s` seconds; that of a joining worker must expire.

    Raises:
        NameTakenError: if the heartbeat changes.
        StoppedError: if told to stop meanwhile.
    """
    first = store.heartbeat()
    if not first or (state_id and first.state_id == state_id):
        return
    if first.run == JOINING:
        patience_s = JOIN_TTL_S
    logger.warning(
        "a worker named %r (%s) was alive a moment ago; watching its heartbeat for up to %.0f s",
        store.worker, _who(first), patience_s,
    )  # fmt: skip
    until = clock() + patience_s
    while clock() < until:
        if stop.wait(0.25):
            raise StoppedError("stopped before the training began", about="training")
        beat = store.heartbeat()
        if not beat:
            return
        if (beat.beat, beat.run) != (first.beat, first.run):
            raise NameTakenError(
                f"the name {store.worker!r} is taken: a worker of expert {store.expert!r} with this name is running "
                f"({_who(beat)}); stop that one, or start this one with another --name",
                about=store.worker,
            )


def _who(beat: Beat) -> str:
    """The process that wrote a heartbeat, for a person who wants to find it."""
    is_time = beat.since is not None and 0 <= beat.since < LATEST_S
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(beat.since)) if is_time else "?"
    return f"pid {beat.pid or '?'} on host {beat.host or '?'}, started {started}"
