"""consumers.settled: other threads copy the weights of the last commit, whatever is folded meanwhile."""

import threading

import torch

from consumers.held import Held
from consumers.settled import Settled
from tests.federation import LAYOUT


def held(value: float) -> Held:
    made = Held(LAYOUT)
    made.weights.flat.fill_(value)
    return made


def test_only_the_weights_that_are_asked_for() -> None:
    """A copy that later folds do not change; None for those of another commit, and once there are none."""
    settled, first = Settled(), held(1.0)
    assert settled.copy("one") is None
    settled.name("one", first)
    copy = settled.copy("one")
    first.weights.flat.fill_(9.0)
    assert copy is not None
    assert copy.flat.eq(1.0).all()
    settled.name("two", held(2.0))
    assert settled.copy("one") is None
    settled.name("", None)
    assert settled.copy("") is settled.copy("two") is None


def test_a_copy_that_has_begun_is_waited_for() -> None:
    """The expert's thread folds into these buffers as soon as it has named others."""
    settled, began, goes_on = Settled(), threading.Event(), threading.Event()
    first = held(1.0)

    class SlowWeights:
        layout = LAYOUT

        @property
        def flat(self) -> torch.Tensor:
            began.set()
            assert goes_on.wait(10)
            return first.weights.flat

    slow = Held(LAYOUT)
    slow.weights = SlowWeights()  # a stand-in that takes its time
    settled.name("one", slow)
    copies: list[torch.Tensor] = []

    def copy() -> None:
        made = settled.copy("one")
        assert made is not None
        copies.append(made.flat)

    def fold() -> None:
        settled.name("two", None)
        first.weights.flat.fill_(9.0)

    threads = [threading.Thread(target=copy)]
    threads[0].start()
    assert began.wait(10)
    threads.append(threading.Thread(target=fold))
    threads[1].start()
    threads[1].join(0.1)
    goes_on.set()
    for thread in threads:
        thread.join()
    assert copies[0].eq(1.0).all()
    assert first.weights.flat.eq(9.0).all()
