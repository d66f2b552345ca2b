"""Rests after work that can be put off, so that it takes no more than its share of a core."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Rest:
    """After each piece of work, a rest of `times` the CPU time that this thread needed for it.

    Args:
        times: 9 leaves the work a tenth of a core.
        clock: seconds; cpu_clock: CPU seconds of the calling thread.
    """

    def __init__(
        self,
        times: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._times = times
        self._clock, self._cpu_clock = clock, cpu_clock
        self._until = float("-inf")

    @property
    def is_over(self) -> bool:
        """True if the work may be done again."""
        return self._clock() >= self._until

    @contextmanager
    def after(self) -> Iterator[None]:
        """The block is the work, also if it fails."""
        began = self._cpu_clock()
        try:
            yield
        finally:
            self._until = self._clock() + self._times * (self._cpu_clock() - began)
