"""fedmoe.util.threads: results in order, few tasks in hand, and none left at work."""

import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest

from fedmoe.util.threads import AHEAD, ALONE, Threads

N = 3
pytestmark = pytest.mark.one_server


@pytest.fixture
def pool() -> Iterator[Executor]:
    """Threads."""
    with ThreadPoolExecutor(N) as executor:
        yield executor


@pytest.mark.parametrize("alone", [True, False])
def test_results_come_in_order(pool: Executor, alone: bool) -> None:
    """With the index of each item."""
    threads = ALONE if alone else Threads(pool, N)
    assert list(threads.in_order(lambda index, item: (index, item * item), range(50))) == [
        (n, n * n) for n in range(50)
    ]
    assert list(threads.in_order(lambda *_: 0, ())) == []


def test_tasks_run_beside_each_other(pool: Executor) -> None:
    """Each waits for the others here."""
    barrier = threading.Barrier(N, timeout=30)
    assert sorted(Threads(pool, N).in_order(lambda *_: barrier.wait(), range(N))) == [*range(N)]


def test_items_are_taken_as_they_are_needed(pool: Executor) -> None:
    """An item may be a mebibyte."""
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 100:
            taken += 1
            yield taken

    for done in Threads(pool, N).in_order(lambda _, item: item, items()):
        assert taken < done + AHEAD * N
    assert taken == 100


def test_after_an_error_no_task_is_at_work(pool: Executor) -> None:
    """The first error in order is raised, though a later one came before it."""
    go, at_work = threading.Event(), 0
    lock = threading.Lock()

    def task(index: int, _: object) -> None:
        nonlocal at_work
        with lock:
            at_work += 1
        try:
            if index == 2:
                go.set()
                raise ValueError("the second error")
            go.wait(30)
            if index == 1:
                raise KeyError("the first error")
        finally:
            with lock:
                at_work -= 1

    with pytest.raises(KeyError):
        list(Threads(pool, N).in_order(task, range(20)))
    assert at_work == 0
