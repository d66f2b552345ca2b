"""Interfaces of the sync's helpers, so that a test can replace them."""

from collections.abc import Callable
from typing import Protocol

from producers.checkpoint import Checkpoint
from producers.heartbeat import SyncStatus
from producers.ledger import Ledger


class Heart(Protocol):
    """Writes the heartbeat when it is due (see `producers.heartbeat`)."""

    is_refused: bool

    def beat(self, ledger: Ledger, status: SyncStatus) -> None:
        """Write the heartbeat if it is due."""
        ...

    def hasten(self, in_s: float = 0.0) -> None:
        """Make the next heartbeat due in so many seconds, if it is not due before."""
        ...


class Watch(Protocol):
    """Checks that an aggregator serves the expert (see `producers.watch`); `held` says why it is held, or is ""."""

    held: str

    def look(self) -> str:
        """The problem, "" if there is none."""
        ...


class Saves(Protocol):
    """Writes checkpoints (see `producers.saver`)."""

    problem: str

    @property
    def is_due(self) -> bool:
        """False for a while after the disk refused a checkpoint."""
        ...

    def save(self, checkpoint: Checkpoint, *, meanwhile: Callable[[], None]) -> bool:
        """Write the checkpoint; return True if it is on disk."""
        ...
