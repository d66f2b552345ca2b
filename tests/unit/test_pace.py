"""When a worker looks for a decision: not long after it was made, and not often before."""

import pytest

from producers.pace import FIRST_POLL_S, LONGEST_POLL_S, USUAL_S, Pace


class Worker:
    """Looks when its pace says so, at a clock that only waiting moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pace = Pace(lambda: self.now)

    def update(self, decided_after_s: float) -> tuple[int, float]:
        """How often it looked, and how long after the decision it saw it."""
        decided_at, looks = self.now + decided_after_s, 1
        self.now += self.pace.sent()
        while self.now < decided_at:
            self.now += self.pace.undecided()
            looks += 1
        self.pace.decided()
        return looks, self.now - decided_at


@pytest.mark.parametrize("took_s", [0.001, 0.02, 0.05, 0.2, 0.8, 3.0])
def test_decisions_that_take_as_long_as_the_last_are_seen_soon(took_s: float) -> None:
    worker = Worker()
    seen = [worker.update(took_s) for _ in range(50)][10:]
    assert sum(looks for looks, _ in seen) / len(seen) <= (3 if took_s < USUAL_S else 12)
    assert sum(late for _, late in seen) / len(seen) <= 0.02 + 0.25 * took_s


def test_a_quick_decision_after_an_outage_is_found_quickly_again() -> None:
    """An hour without an aggregator: a look each second meanwhile; a few updates later it is as before."""
    worker = Worker()
    looks, late = worker.update(3600.0)
    assert looks <= 3620
    assert late <= LONGEST_POLL_S
    quick = [worker.update(0.001) for _ in range(6)]
    assert sum(late for _, late in quick) < 0.5
    assert quick[-1] == (1, pytest.approx(FIRST_POLL_S - 0.001))
