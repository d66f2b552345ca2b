"""The timing of a worker's sync: due times, and the waits for the decision of an update."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

FIRST_POLL_S = 0.01
LONGEST_POLL_S = 1.0
LONGEST_RESEND_S = 5.0  # until a resend of an update whose entry is removed without a decision each time
AT_THE_END_S = 5.0  # last part of the drain, at most half of it, in which no step is waited for
USUAL_S = 0.25  # the longest time to a decision that sets the first wait


class Pace:
    """The waits between polls: the first is 3/4 of the time to the last decision, later ones grow by half each.

    So a decision is noticed soon after it was made, and few polls come too early. If the first poll already finds the
    decision, the estimate is halved. If a decision takes long, the wait grows to one second, and the
    estimate to USUAL_S at most.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sent_at = clock()
        self._took_s = 0.0
        self._wait_s = FIRST_POLL_S
        self._looks = 0
        self._resend_s = FIRST_POLL_S
        self._resend_at = 0.0

    def sent(self) -> float:
        """An update was published: return the seconds until the first poll."""
        self._sent_at, self._looks = self._clock(), 0
        self._wait_s = max(FIRST_POLL_S, self._took_s / 4)
        return max(FIRST_POLL_S, self._took_s * 3 / 4)

    def undecided(self) -> float:
        """A poll found no decision: return the seconds until the next poll."""
        self._looks += 1
        wait_s, self._wait_s = self._wait_s, min(LONGEST_POLL_S, self._wait_s * 1.5)
        return wait_s

    def decided(self) -> None:
        """A poll has found the decision."""
        took_s = min(USUAL_S, self._clock() - self._sent_at)
        self._took_s = took_s if self._looks else took_s / 2

    def gone(self) -> None:
        """The entry was removed without a decision: delay the resend, twice as long as the last time."""
        self._resend_s = min(LONGEST_RESEND_S, self._resend_s * 2)
        self._resend_at = self._clock() + self._resend_s

    def rest_s(self) -> float:
        """Seconds until an update may be published again."""
        return max(0.0, self._resend_at - self._clock())

    def moved_on(self) -> None:
        """The next update is another one: reset the delay of resends."""
        self._resend_s, self._resend_at = FIRST_POLL_S, 0.0


@dataclass(slots=True, kw_only=True)
class Timetable:
    """Due times of the sync's actions, in seconds of its clock; `inf` is never.

    Args:
        update_at: make the next update. save_at: write a checkpoint between two updates.
        hurry_at: stop waiting for the end of a step. end_at: end, even with undecided updates.
        is_ending: the sync was told to end.
    """

    update_at: float = 0.0
    save_at: float = math.inf
    hurry_at: float = math.inf
    end_at: float = math.inf
    is_ending: bool = False

    def end_within(self, timeout_s: float, now: float) -> None:
        """End within `timeout_s` seconds; only the first call counts."""
        if not self.is_ending:
            self.hurry_at = now + max(timeout_s / 2, timeout_s - AT_THE_END_S)
            self.end_at = now + timeout_s
            self.is_ending = True
