"""When a worker's sync does what, and how long it waits for the decision of an update."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

FIRST_POLL_S = 0.01
LONGEST_POLL_S = 1.0
LONGEST_RESEND_S = (
    5.0  # until an update is sent again that is taken off the stream without a decision each time
)
AT_THE_END_S = 5.0  # of the drain, at most half of it: the end of a step is not waited for any more
USUAL_S = 0.25  # a decision that takes longer is not waited for in one go


class Pace:
    """The waits: first most of the time that the last decision took, then short ones that grow by half each.

    So a decision is noticed soon after it was made, and few looks come too early. One that is there at the first look
    may have been there for long, and halves the next wait. One that takes for ever is looked for once a second, and
    says nothing about the next.
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
        """An update was published; seconds until the first look."""
        self._sent_at, self._looks = self._clock(), 0
        self._wait_s = max(FIRST_POLL_S, self._took_s / 4)
        return max(FIRST_POLL_S, self._took_s * 3 / 4)

    def undecided(self) -> float:
        """Seconds until the next look."""
        self._looks += 1
        wait_s, self._wait_s = self._wait_s, min(LONGEST_POLL_S, self._wait_s * 1.5)
        return wait_s

    def decided(self) -> None:
        """A look has found the decision."""
        took_s = min(USUAL_S, self._clock() - self._sent_at)
        self._took_s = took_s if self._looks else took_s / 2

    def gone(self) -> None:
        """The update was taken off the stream without a decision: it rests, twice as long as the last time."""
        self._resend_s = min(LONGEST_RESEND_S, self._resend_s * 2)
        self._resend_at = self._clock() + self._resend_s

    def rest_s(self) -> float:
        """Seconds until an update may be published."""
        return max(0.0, self._resend_at - self._clock())

    def moved_on(self) -> None:
        """What is published next has not been taken off the stream yet."""
        self._resend_s, self._resend_at = FIRST_POLL_S, 0.0


@dataclass(slots=True, kw_only=True)
class Timetable:
    """When the sync does what, in seconds of its clock; `inf` is never.

    Args:
        update_at: make the next update. save_at: write a checkpoint between two updates.
        rules_at: look for other rules.
        hurry_at: do not wait for the end of a step any more. end_at: end, whatever is undecided.
        is_ending: somebody wants the sync to end.
    """

    update_at: float = 0.0
    save_at: float = math.inf
    rules_at: float = math.inf
    hurry_at: float = math.inf
    end_at: float = math.inf
    is_ending: bool = False

    def end_within(self, timeout_s: float, now: float) -> None:
        """End in so many seconds at most; the first call counts."""
        if not self.is_ending:
            self.hurry_at = now + max(timeout_s / 2, timeout_s - AT_THE_END_S)
            self.end_at = now + timeout_s
            self.is_ending = True
