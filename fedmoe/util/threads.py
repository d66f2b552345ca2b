"""Work on the parts of something large by several threads, with the results in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 2  # tasks in hand for each thread: it never waits for the next one, and memory stays bounded


def n_cores() -> int:
    """Number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


class Threads:
    """At most `n` threads of `pool` at work on one thing; without a pool the caller does it all."""

    def __init__(self, pool: Executor | None = None, n: int = 1) -> None:
        self._pool, self._n = pool, n

    def in_order(self, task: Callable[[int, T], R], items: Iterable[T]) -> Iterator[R]:
        """The result of `task` for each index and item, in order; an error comes in the place of its result.

        Items are taken as they are needed. When the iterator ends or is closed, no task is at work any more.
        """
        if self._pool is None:
            for index, item in enumerate(items):
                yield task(index, item)
            return
        at_work: deque[Future[R]] = deque()
        try:
            for index, item in enumerate(items):
                at_work.append(self._pool.submit(task, index, item))
                if len(at_work) >= AHEAD * self._n:
                    yield at_work.popleft().result()
            while at_work:
                yield at_work.popleft().result()
        finally:
            for future in at_work:
                future.cancel()
            wait(at_work)


ALONE = Threads()
