"""How long to wait before the next try, and saying so once instead of at every try."""

import logging
import random
import time
from collections.abc import Callable

from fedmoe.errors import RedisUnfitError

FIRST_S = 0.1
LONGEST_S = 1.0  # so that a Redis that is back is in use again within two seconds
REPEAT_S = 30.0
REPEAT_UNFIT_S = 60.0


class Backoff:
    """Waits that double from 0.1 s to 1 s, with jitter; a problem is said when it begins, every 30 s, and when it ends.

    One that only a person can repair (RedisUnfitError) is said once a minute.

    Args:
        what: names the thing in messages.
        logger: where the messages go.
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
        """Note that it works (again)."""
        if self.since is not None:
            self._logger.warning("%s: works again after %.1f s", self._what, self._clock() - self.since)
        self._wait_s, self._said, self.since = FIRST_S, "", None
