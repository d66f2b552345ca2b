"""What a state of the search is, and which faults its federation may meet."""

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.protocol.world import Reply

FAULTS = (
    "lost", "late", "kill_worker", "kill_aggregator", "lease", "failover", "expire", "trim", "forge", "leave",
    "new_lineage", "empty", "rules", "hold", "rollback", "orphans", "spoil", "unpack",
)  # fmt: skip
SOUND, BROKEN = 0, 1  # a connection
FREE, CLEAN, DIRTY = 0, 1, 2  # a WATCH
ENDLESS = 300  # steps of a run without faults; those that end need a third of it
NO_REPLIES = 0  # the number of the empty list of replies


@dataclass(frozen=True, kw_only=True)
class Scope:
    """A federation and how often each fault may happen in one run.

    Args:
        units: updates of each worker.
        disk: workers have a state directory; checkpoints: and write it while an update is in flight.
        max_staleness, max_norm: what is above is refused; one unit of training has norm 1.
        momentum: of the server optimizer nesterov; 0: sgd.
        wire_format: of updates and pulls; fp32, or bf16, with which experts have a tail.
        parts: a Redis string holds one value of the weights, so they lie in parts once they are written.
        lag: writes that a failover takes back at most.
        paused: it begins with aggregator 0 loaded, and paused past its lease; nobody has the lease.
        resent: entries that the stream takes at most beyond one for each update and forgery; a worker can be so
            unlucky as to send one update again without end.
        faults: how often, by the names in FAULTS; what is not named never happens.
    """

    workers: int = 1
    aggregators: int = 1
    units: int = 2
    disk: bool = True
    checkpoints: bool = False
    max_staleness: int = 9
    max_norm: float = 9.0
    momentum: float = 0.0
    wire_format: str = "fp32"
    parts: bool = False
    lag: int = 6
    resent: int = 2
    paused: bool = False
    faults: Mapping[str, int] = field(default_factory=dict)

    @property
    def entries(self) -> int:
        """Entries that the stream takes at most in one run."""
        return self.workers * self.units + self.faults.get("forge", 0) + self.resent

    @property
    def refuses_nothing(self) -> bool:
        """True if no update of this federation breaks a rule."""
        return self.max_norm >= self.units and self.max_staleness >= self.workers * self.units


class Slot(NamedTuple):
    """An actor: its memory, the replies of this turn, the turn's choice, its connection and its WATCH."""

    memory: int
    replies: int
    choice: int
    connection: int
    watch: int


class State(NamedTuple):
    """The server, the replica that lags (-1: none does) by `missed` writes, the actors, requests still on their way.

    `owed` is for the checks: the aggregators that remembered the expert when the server lost it, while it is gone.
    """

    db: int
    replica: int
    missed: int
    slots: tuple[Slot, ...]
    late: tuple[tuple[int, int], ...]
    budget: tuple[int, ...]
    owed: tuple[int, ...] = ()


class Label(NamedTuple):
    """A step of a trace, put into words only when it is printed."""

    actor: int = -1
    request: int = -1
    reply: Reply = Reply()
    what: str = ""


class Table:
    """Numbers for values; each value is kept once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[Hashable, int] = {}
        self._ids: dict[int, frozenset[str]] = {}

    def __call__(self, value: Hashable) -> int:
        number = self._numbers.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number

    def ids(self, number: int) -> frozenset[str]:
        """The commit ids that occur in a value."""
        if number not in self._ids:
            self._ids[number] = frozenset(re.findall(r"\bc\d+\b", repr(self.values[number])))
        return self._ids[number]
