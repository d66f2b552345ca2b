"""How long updates waited for this aggregator. Pure.

It is measured by the aggregator's own clock. The id of an entry holds a time, too, but that comes from the clock of
another machine, and a worker may choose any id for the entry that it adds.
"""

from collections.abc import Callable

from fedmoe.protocol.records import Entry


class Waiting:
    """Bounds how long the entries of a stream waited until they were read.

    Entries that a read returns were added after the last read that left none behind. A read that waits returns as soon
    as there is an entry, so its own time is not counted.

    Args:
        clock: seconds, monotonic.

    Attributes:
        since: no entry that is still to be read waits since before this time.
        oldest: the same for the entries that were read last, when they were read.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.since = self.oldest = clock()

    def begin(self) -> None:
        """Start now: what waits already has waited for another aggregator, or for a release."""
        self.since = self.oldest = self._clock()

    def read(self, read: Callable[[], list[Entry]], count: int) -> list[Entry]:
        """The entries that `read` returns, `count` at most."""
        called = self._clock()
        entries = read()
        now = self._clock()
        self.oldest = self.since + now - called
        self.since = now if len(entries) < count else self.oldest
        return entries
