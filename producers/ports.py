"""What the sync needs of those who help it, so that a test can put others in their place."""

from collections.abc import Callable
from typing import Protocol

from producers.checkpoint import Checkpoint
from producers.heartbeat import SyncStatus
from producers.ledger import Ledger


class Heart(Protocol):
    """Writes the heartbeat when it is due (see `producers.heartbeat`)."""

    is_refused: bool

    def beat(self, ledger: Ledger, status: SyncStatus) -> None:
        """Write it if it is due."""
        ...

    def hasten(self) -> None:
        """Make it due now."""
        ...


class Watch(Protocol):
    """Looks for an aggregator (see `producers.watch`)."""

    def look(self) -> str:
        """What is wrong, "" for nothing."""
        ...


class Saves(Protocol):
    """Writes checkpoints (see `producers.saver`)."""

    problem: str

    @property
    def is_due(self) -> bool:
        """False for a while after the disk refused one."""
        ...

    def save(self, checkpoint: Checkpoint, *, meanwhile: Callable[[], None]) -> bool:
        """True if it is on disk."""
        ...
