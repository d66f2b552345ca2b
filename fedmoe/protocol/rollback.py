"""Rollbacks: an operator gives an expert the weights of an earlier version, as a new version. Pure.

Versions and decisions never go back. So the versions between the one that the weights are of and the rollback keep
their numbers, and what was trained on one of them answers to training that is no longer there. An update with such a
base is refused, and a worker drops what it trained on such a base.
"""

import json
from dataclasses import dataclass
from typing import NamedTuple

MOST_INTERVALS = 100  # beyond, the two oldest become one, which may refuse more than was rolled back


class Interval(NamedTuple):
    """One rollback: the expert got the weights of version `to`, in place of those of version `last`."""

    to: int
    last: int

    def __str__(self) -> str:
        """For people: version 13 has the weights of version 5; versions 6 to 12 were rolled back."""
        is_one = self.last == self.to + 1
        taken = f"version {self.last} was" if is_one else f"versions {self.to + 1} to {self.last} were"
        return f"version {self.last + 1} has the weights of version {self.to}; {taken} rolled back"

    def holds(self, version: int) -> bool:
        """True if that version was rolled back; version `to` was not."""
        return self.to < version <= self.last


@dataclass(frozen=True, slots=True)
class RolledBack:
    """All rollbacks of an expert, oldest first; each made version `last + 1`."""

    intervals: tuple[Interval, ...] = ()

    @property
    def latest(self) -> tuple[int, int]:
        """The last rollback: the version whose weights the expert got, and the version that has them now."""
        to, last = self.intervals[-1]
        return to, last + 1

    @property
    def made(self) -> int:
        """The version that the last rollback made; 0 if there was none."""
        return self.latest[1] if self.intervals else 0

    def holds(self, version: int) -> bool:
        """True if that version was rolled back."""
        return any(one.holds(version) for one in self.intervals)

    def reason(self, base_version: int) -> str:
        """Why an update with this base is refused, as a sentence; "" if its base was not rolled back."""
        to = next((one.to for one in reversed(self.intervals) if one.holds(base_version)), None)
        if to is None:
            return ""
        return (
            f"trained on version {base_version}, which an operator rolled back to version {to} (fedmoe expert "
            "rollback); its worker goes on from the newest version"
        )

    def takes_back(self, version: int, known: "RolledBack") -> bool:
        """True if a rollback that is not in `known` took back `version`, seen when only those in `known` had been made.

        After a failover `version` may be above all that the expert has reached again; it counts as taken back, too.
        """
        seen = {one.last for one in known.intervals}
        return any(one.to < version for one in self.intervals if one.last not in seen)

    def and_also(self, to: int, last: int) -> "RolledBack":
        """With one more rollback."""
        some = (*self.intervals, Interval(to, last))
        if len(some) > MOST_INTERVALS:
            first, second, *rest = some
            some = (Interval(min(first.to, second.to), second.last), *rest)
        return RolledBack(some)

    def to_json(self) -> str:
        """[[to, last], …]."""
        return json.dumps([list(one) for one in self.intervals], separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "RolledBack":
        """Parse a stored record; ValueError if it is malformed."""
        try:
            pairs = [(to, last) for to, last in json.loads(text)]
        except (TypeError, RecursionError) as error:
            raise ValueError(f"rolled_back is {text!r}") from error
        if not all(type(number) is int for pair in pairs for number in pair):
            raise ValueError(f"rolled_back is {text!r}")
        return cls(tuple(Interval(to, last) for to, last in pairs))


NEVER = RolledBack()
