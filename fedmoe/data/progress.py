"""Progress lines for a long task."""

import time
from collections.abc import Callable

EVERY_S = 5.0


class Progress:
    """Reports every five seconds how many rows are done.

    Args:
        report: prints a line for people.
        what: the task, as the beginning of each line.
        total: approximate number of rows, 0 if it is not known.
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
        """Note that `done` rows are done. Time counts from the first call, so that the start-up is left out."""
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
