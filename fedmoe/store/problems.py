"""An aggregator's present problem, stored for `fedmoe status`; the entry expires."""

import logging
import time
from collections.abc import Callable

from fedmoe.errors import RedisUnavailableError
from fedmoe.store.connection import Connection

logger = logging.getLogger(__name__)

PROBLEM_TTL_S = 60.0
REPEAT_S = 15.0


class Problems:
    """One process's entry in the hash at `key`; a failed write is only logged.

    Args:
        key: of the expert's (or the gateway's) problems.
        holder: name of this process.
        clock: seconds, monotonic.

    Attributes:
        said: the stored problem; "" if there is none.
    """

    def __init__(
        self, connection: Connection, key: str, *, holder: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._connection = connection.at(key)
        self._key = key
        self._holder = holder
        self._clock = clock
        self.said = ""
        self._said_at = 0.0

    def report(self, problem: str) -> None:
        """Store a present problem; call it again while the problem lasts."""
        now = self._clock()
        if problem == self.said and now - self._said_at < REPEAT_S:
            return
        try:
            with self._connection.errors(), self._connection.client.pipeline(transaction=True) as pipe:
                pipe.hset(self._key, self._holder, problem)
                pipe.pexpire(self._key, int(PROBLEM_TTL_S * 1000))
                pipe.execute()
            self.said, self._said_at = problem, now
        except RedisUnavailableError as error:
            logger.debug("the problem cannot be written to Redis: %s", error)

    def repeat(self) -> None:
        """Keep the stored problem from expiring, if there is one."""
        if self.said:
            self.report(self.said)

    def solved(self) -> None:
        """Remove the stored problem. This also removes other processes' problems, until they report them again."""
        if not self.said:
            return
        try:
            with self._connection.errors():
                self._connection.client.unlink(self._key)
            self.said = ""
        except RedisUnavailableError as error:
            logger.debug("the problem cannot be removed from Redis: %s", error)
