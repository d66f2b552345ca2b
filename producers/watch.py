"""Checks that an aggregator serves the expert and applies updates; otherwise training is in vain, unnoticed."""

import logging
from collections.abc import Callable

from fedmoe.store.presence import Seen
from fedmoe.store.worker import WorkerStore
from fedmoe.util.text import printable

logger = logging.getLogger(__name__)

LOOK_S = 2.0  # until a second look, so that the problem is reported soon, and not while a standby takes over


class AggregatorWatch:
    """Checks with each heartbeat whether an aggregator holds the expert's lease, and whether the expert is held.

    Args:
        hasten: makes the next heartbeat due after so many seconds.

    Attributes:
        held: why the expert is held, "" if it is not.
        problem: the message that nobody holds the lease, or that the expert is held; "" if neither is so, as far as
            this user may read it.
    """

    def __init__(self, store: WorkerStore, hasten: Callable[[float], None]) -> None:
        self.problem = ""
        self.held = ""
        self._store = store
        self._hasten = hasten
        self._seen: Seen | None = None
        self._missed = 0

    def look(self) -> str:
        """Check what the last heartbeat found, if there is a new one; return the problem.

        Two checks in a row must fail, because a standby needs a moment to take over.
        """
        seen = self._store.seen
        if seen is None or seen is self._seen:
            return self.problem
        self._seen = seen
        if seen.is_served is not False:
            if self._missed and self.problem:
                logger.warning("an aggregator serves expert %r again", self._store.expert)
            self._missed = 0
            self.problem = self._told(seen.held)
            return self.problem
        self._missed += 1
        if self._missed == 1:
            self._hasten(LOOK_S)
        elif not self.problem:
            self.problem = (
                f"no aggregator serves expert {self._store.expert!r}: start `fedmoe aggregator run`; until then no "
                "update is applied"
            )
            logger.warning("%s (training goes on)", self.problem)
        return self.problem

    def _told(self, held: str) -> str:
        """The message that the expert is held, "" if it is not; logged once."""
        expert = self._store.expert
        problem = f"expert {expert!r} is held, and updates wait: {printable(held)}" if held else ""
        if held and not self.held:
            logger.warning("%s (training goes on, and nothing is lost)", problem)
        elif self.held and not held:
            logger.warning("expert %r is released: updates are applied again", expert)
        self.held = held
        return problem
