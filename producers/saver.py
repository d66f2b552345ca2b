"""Writes checkpoints in a thread, so that a slow, full or broken disk stops neither heartbeats nor training."""

import logging
import threading
import time
from collections.abc import Callable

from fedmoe.util.backoff import Backoff
from producers.checkpoint import Checkpoint, StateDir

logger = logging.getLogger(__name__)

RETRY_S = 2.0  # after a failure; a checkpoint is large, so retries are rare
SLOW_S = 10.0  # a write that takes longer is reported as a problem
LOOK_S = 1.0


class Saver:
    """Writes checkpoints to a state directory, one at a time, each in a thread of its own.

    Args:
        clock: seconds, monotonic.

    Attributes:
        problem: what is wrong with the disk, "" if nothing is.
    """

    def __init__(self, state_dir: StateDir, clock: Callable[[], float] = time.monotonic) -> None:
        self.problem = ""
        self._state_dir = state_dir
        self._clock = clock
        self._backoff = Backoff("checkpoint", logger, clock)
        self._retry_at = float("-inf")

    @property
    def is_due(self) -> bool:
        """False for a while after the disk refused a checkpoint."""
        return self._clock() >= self._retry_at

    def save(self, checkpoint: Checkpoint, *, meanwhile: Callable[[], None]) -> bool:
        """Write it; return True if it is on disk, False if the disk refused it for the reason in `problem`.

        `meanwhile` is called about once a second until the write ends, however long that takes.
        """
        job = _Job(lambda: self._state_dir.save(checkpoint))
        began = time.monotonic()
        while not job.wait(LOOK_S):
            if time.monotonic() - began > SLOW_S:
                self._failed(f"the write has not ended after {SLOW_S:g} s")
            meanwhile()
        if isinstance(job.error, OSError):
            self._failed(job.error.strerror or str(job.error))
            return False
        if job.error is not None:
            raise job.error
        self.problem = ""
        self._backoff.ok()
        return True

    def _failed(self, why: str) -> None:
        self.problem = (
            f"cannot write the checkpoint to {self._state_dir.path} ({why}): training goes on, but no new update is "
            "published until it is written: free disk space or repair the disk"
        )
        self._backoff.failed(OSError(self.problem))
        self._retry_at = self._clock() + RETRY_S


class _Job:
    """A call in a daemon thread; `error` is the exception that it raised."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.error: Exception | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except Exception as error:  # the caller of `wait` reads it
            self.error = error

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds; return True if the call has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()
