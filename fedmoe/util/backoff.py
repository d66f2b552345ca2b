"""Backoff between retries, with one log line per problem instead of one per retry."""

import logging
import random
import time
from collections.abc import Callable

from fedmoe.errors import RedisUnfitError

FIRST_S = 0.1
LONGEST_S = 1.0  # so that work resumes within two seconds after Redis is back
REPEAT_S = 30.0
REPEAT_UNFIT_S = 60.0


class Backoff:
    """Waits that double from 0.1 s to 1 s, with jitter; a problem is logged at its start, every 30 s, and at its end.

    A problem that only a person can repair (RedisUnfitError) is logged once a minute.

    Args:
        what: name of the retried thing, for messages.
        logger: receives the messages.
        clock: seconds, monotonic.
    """

    def __init__(
        self, what: str, logger: logging.Logger, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what = what
        self._logger = logger
        self._clock = clock
        self._random = random.Random()  # noqa: S311  # jitter, not a secret
        self._wait_s = FIRST_S
        self._said = ""
        self._said_at = 0.0
        self.since: float | None = None

    def failed(self, error: Exception) -> float:
        """Note a failure; returns the seconds to wait."""
        now = self._clock()
        self.since = now if self.since is None else self.since
        is_unfit = isinstance(error, RedisUnfitError)
        repeat_s = REPEAT_UNFIT_S if is_unfit else REPEAT_S
        if str(error) != self._said or now - self._said_at > repeat_s:
            self._said, self._said_at = str(error), now
            self._logger.warning("%s: %s%s", self._what, error, "" if is_unfit else "; trying again")
        wait_s, self._wait_s = self._wait_s, min(LONGEST_S, self._wait_s * 2)
        return wait_s * self._random.uniform(0.75, 1.0)

    def ok(self) -> None:
        """Note a success; after failures, log that it works again."""
        if self.since is not None:
            self._logger.warning("%s: works again after %.1f s", self._what, self._clock() - self.since)
        self._wait_s, self._said, self.since = FIRST_S, "", None
