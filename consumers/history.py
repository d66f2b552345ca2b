"""The commits that the retained state of one expert passed through, with the lines that each one wrote. Pure."""

from collections.abc import Sequence

import msgpack

from fedmoe.protocol.lines import Line

LENGTH = 10_000  # commits; nearly three hours at one per second
LINES_BYTES = 16 * 1024 * 1024  # bound for the lines of all commits together


class History:
    """A chain of commits, oldest first; the last commit made the retained state.

    Args:
        length: maximum number of commits.

    Attributes:
        lines: commit -> its lines of log and dead, packed as msgpack, in a fifth of the space.
        attempted: the commit sent last, with its lines, until it is known to have succeeded.
    """

    def __init__(self, length: int = LENGTH) -> None:
        self.lines: dict[str, bytes] = {}
        self.attempted: tuple[str, bytes] | None = None
        self._length = length
        self._n_bytes = 0  # of all lines

    def __contains__(self, commit: str) -> bool:
        return commit in self.lines

    @property
    def last(self) -> str:
        """The commit of the retained state, "" before the first."""
        return next(reversed(self.lines), "")

    def attempt(self, commit: str, log: Sequence[Line] = (), dead: Sequence[Line] = ()) -> None:
        """Note a commit that is about to be sent: even if its reply is lost, it may have succeeded."""
        self.attempted = commit, _packed(log, dead)

    def arrive(self, commit: str) -> None:
        """Note the commit of the retained state: the last one, the attempted one, or one that starts a new history."""
        if commit == self.last:
            return  # the attempted commit may still succeed
        attempted, self.attempted = self.attempted, None
        if attempted is not None and attempted[0] == commit:
            self.lines[commit] = attempted[1]
            self._n_bytes += len(attempted[1])
        else:
            self.lines, self._n_bytes = {commit: _packed((), ())}, 0
        while len(self.lines) > self._length or (self._n_bytes > LINES_BYTES and len(self.lines) > 1):
            self._n_bytes -= len(self.lines.pop(next(iter(self.lines))))

    def since(self, commit: str) -> tuple[list[Line], list[Line]]:
        """The lines of log and dead, oldest first, of the commits after this one; of all commits if it is ""."""
        log: list[Line] = []
        dead: list[Line] = []
        is_later = commit == ""
        for one, lines in self.lines.items():
            if is_later:
                more_log, more_dead = msgpack.unpackb(lines)
                log += more_log
                dead += more_dead
            is_later = is_later or one == commit
        return log, dead


def _packed(log: Sequence[Line], dead: Sequence[Line]) -> bytes:
    return bytes(msgpack.packb([[dict(line) for line in log], [dict(line) for line in dead]]))
