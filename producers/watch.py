"""Checks that an aggregator serves the expert and applies updates; otherwise training is in vain, unnoticed."""

import logging
import time
from collections.abc import Callable

from fedmoe.store.worker import WorkerStore
from fedmoe.util.text import printable

logger = logging.getLogger(__name__)

LOOK_S = 2.0  # so that the problem is reported within two leases, which last 5 s by default


class AggregatorWatch:
    """Checks every LOOK_S seconds whether an aggregator holds the expert's lease, and whether the expert is held.

    Args:
        clock: seconds, monotonic.

    Attributes:
        held: why the expert is held, "" if it is not.
        problem: the message that nobody holds the lease, or that the expert is held; "" if neither is so, as far as
            this user may read it.
        next_at: when the next check is due, on that clock.
    """

    def __init__(self, store: WorkerStore, clock: Callable[[], float] = time.monotonic) -> None:
        self.problem = ""
        self.next_at = 0.0
        self._store = store
        self._clock = clock
        self._missed = 0
        self.held = ""

    def look(self) -> str:
        """Check the lease if it is due; return the problem.

        Two checks in a row must fail, because a standby needs a moment to take over.

        Raises:
            RedisUnavailableError: if Redis cannot be reached.
        """
        now = self._clock()
        if now < self.next_at:
            return self.problem
        self.next_at = now + LOOK_S
        is_served, held = self._store.served()
        if is_served is not False:
            if self._missed and self.problem:
                logger.warning("an aggregator serves expert %r again", self._store.expert)
            self._missed = 0
            self.problem = self._told(held)
            return self.problem
        self._missed += 1
        if self._missed >= 2 and not self.problem:
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
