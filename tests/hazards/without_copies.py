"""Patches that take rules about the tail's copied parts out of the project's own code, as in `without`."""

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from fedmoe.protocol.growth import Growth
from fedmoe.protocol.keys import ExpertKeys
from fedmoe.protocol.tail import Copy, copied_keys
from fedmoe.protocol.update import Part
from fedmoe.store import copies
from fedmoe.store.commit import Commit
from fedmoe.store.expert import ExpertStore
from fedmoe.store.parts import NewWeights

_copy = Growth.copy


class CopiesAtTheCommit(ExpertStore):
    """The worker's own parts are checked and folded, and copied when they are committed."""

    def parts(
        self, worker: str, run: str, seq: int, parts: Sequence[Part], copy: Copy | None = None
    ) -> Generator[bytes, None, None]:
        yield from super().parts(worker, run, seq, parts)
        if copy is not None:
            copy.n_made = copy.count
            self._late = [
                (self.keys.part(worker, run, seq, i), key) for i, key in enumerate(copy.keys(self.keys))
            ]

    def commit(self, commit: Commit) -> None:
        for source, key in self._late:
            self._redis.copy(source, key)
        super().commit(commit)


class RemovesCopiesFirst(ExpertStore):
    """Whatever writes the weights removes the copies before its commit."""

    def commit(self, commit: Commit) -> None:
        if commit.weights is not None and (
            gone := copied_keys(self.keys, self._redis.hgetall(self.keys.tail))
        ):
            self._redis.unlink(*gone)
        super().commit(commit)


class WatchesPayloads(ExpertStore):
    """A commit watches the keys of the updates that it decides."""

    def check_head(self, pipe: Any, commit: Commit, snapshot: NewWeights) -> dict[str, int]:
        found = super().check_head(pipe, commit, snapshot)
        if commit.unlink:
            pipe.watch(*commit.unlink)
        return found


def copy_of_one_name(growth: Growth, name: str, n_parts: int) -> Copy | None:
    """All attempts to decide an update write the same copy."""
    return _copy(growth, "same", n_parts)


def leaves_copies(keys: ExpertKeys, stored: Mapping[bytes, bytes] | None) -> list[str]:
    """Whatever writes the weights leaves the copies."""
    return []


COPY_OVER = copies.COPY.replace("KEYS[1], KEYS[2])", "KEYS[1], KEYS[2], 'REPLACE')")
COPY_FOR_EVER = copies.COPY.replace("redis.call('PEXPIRE', KEYS[2], ARGV[2])", "")
assert len({COPY_OVER, COPY_FOR_EVER, copies.COPY}) == 3


def first_reading(*what: Any, **how: Any) -> Any:
    """A reader that misses a copy does not begin again."""
    yield next(copies.readings(*what, **how))
