"""Lines that say how far something long is."""

import time
from collections.abc import Callable

EVERY_S = 5.0


class Progress:
    """Says every five seconds how many rows are done.

    Args:
        what: is done with the rows.
        total: about how many rows there are, 0 if nobody knows.
        clock: seconds.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        what: str,
        total: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say = say
        self._what = what
        self._total = total
        self._clock = clock
        self._began = self._said = clock()

    def at(self, done: int) -> None:
        """So many rows are done."""
        now = self._clock()
        if now - self._said < EVERY_S:
            return
        self._said = now
        line = f"{self._what}: {done:,} rows"
        if done < self._total:
            left_s = (now - self._began) * (self._total - done) / max(done, 1)
            line += f" of about {self._total:,}, about {left_s:.0f} s left"
        self._say(line)
