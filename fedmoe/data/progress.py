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
        report: Callable[[str], None],
        what: str,
        total: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report = report
        self._what = what
        self._total = total
        self._clock = clock
        self._began: tuple[float, int] | None = None
        self._said = 0.0

    def at(self, done: int) -> None:
        """So many rows are done. Time counts from the first call on: what is done before may have to be started."""
        now = self._clock()
        if self._began is None:
            self._began, self._said = (now, done), now
        if now - self._said < EVERY_S:
            return
        self._said = now
        line = f"{self._what}: {done:,} rows"
        since, begun = self._began
        if begun < done < self._total:
            left_s = (now - since) * (self._total - done) / (done - begun)
            line += f" of about {self._total:,}, about {left_s:.0f} s left"
        self._report(line)
