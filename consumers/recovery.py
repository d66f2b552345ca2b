"""What an aggregator does with what it remembers when Redis has lost it.

A Redis that was emptied, that came back from an older file, or in which a part of an expert was overwritten holds less
than the aggregator that served the expert. Before an aggregator gives up its memory, `Recovery.settle` compares:

    Redis holds the commit that is remembered, whole   nothing was lost
    Redis holds nothing, a part is missing or wrong,   Redis lost something: the aggregator that remembers the newest
    or it holds an earlier commit of this history      version writes the expert back, on top of what Redis holds
    Redis holds a commit that this memory never saw    somebody else committed, or an operator restored a backup:
                                                       Redis is right. Kept updates that it lacks are announced
                                                       again; `prev` keeps them from counting twice

*Earlier commit of this history* means: a commit that this very memory passed through. Comparing versions would not do:
it would undo `fedmoe restore --replace`.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from consumers.expert import Expert
from fedmoe.archive import Archive
from fedmoe.errors import StaleStateError, UnknownExpertError, UpdateError
from fedmoe.records import Decided, Meta
from fedmoe.store.expert import ExpertStore
from fedmoe.store.lifecycle import Condition, Line
from fedmoe.update import Header

logger = logging.getLogger(__name__)

CLAIM_WAIT_S = 2.0  # in which every aggregator has found out what Redis lost, and has told what it remembers

Update = tuple[Header, list[bytes]]


def undone(
    lines: Sequence[Line],
    mine: Mapping[str, Decided],
    theirs: Mapping[str, Decided],
    load: Callable[[Line], Update | None],
) -> list[Line]:
    """The lines of applied updates that Redis lacks: it holds an earlier update of their workers as the last decided.

    A worker whose last decided update in Redis is not found among those before has simply gone on.

    Args:
        lines: of the log in memory, oldest first.
        mine: the last decided update of each worker in memory.
        theirs: the last decided update of each worker in Redis.
        load: the kept update of a line; its header names the update before it.
    """
    lost = []
    for worker, last in mine.items():
        head = theirs[worker].id if worker in theirs else None
        if head == last.id:
            continue
        after: list[int] = []
        for number in range(len(lines) - 1, -1, -1):
            line = lines[number]
            if line.get("worker") != worker:
                continue
            if head is not None and (line["run"], line["seq"]) == head:
                lost += after
                break
            after.append(number)
            update = load(line)
            if update is not None and update[0].prev == head:
                lost += after
                break
    return [lines[number] for number in sorted(lost)]


class Recovery:
    """Compares what an aggregator remembers of one expert with what Redis holds.

    Args:
        store: of this expert.
        holder: name of this aggregator, unique.
        archive: where applied updates are kept (`--keep-updates`), None for nowhere.
        clock: seconds.
    """

    def __init__(
        self,
        store: ExpertStore,
        *,
        holder: str,
        archive: Archive | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.claimed_at: float | None = (
            None  # since when all of Redis' aggregators know what is remembered here
        )
        self._store = store
        self._holder = holder
        self._archive = archive
        self._clock = clock

    def settle(self, expert: Expert) -> None:
        """Return when memory is of no more use: Redis holds what it holds, or something that replaces it.

        Needs no lease: the server lost that too, and a standby that remembers nothing may have taken it.

        Raises:
            UnknownExpertError: while it is not settled which aggregator writes the expert back.
            StaleStateError: if somebody else has just written to it.
        """
        found = self._store.condition()
        is_known = self._is_of_this_history(expert, found)
        if is_known and (found.commit != expert.meta.commit or found.damage):
            self._write_back(expert, found)
        elif not is_known:
            self._give_way(expert, found)
        self.claimed_at = None

    @staticmethod
    def _is_of_this_history(expert: Expert, found: Condition) -> bool:
        """True if memory passed through the commit that Redis holds; without meta, the weights' own commit counts."""
        if found.commit:
            return found.commit in expert.history
        known = found.weights_commit in expert.history or found.weights_commit == expert.meta.weights_commit
        return known or not found.weights_commit

    def _write_back(self, expert: Expert, found: Condition) -> None:
        version = expert.meta.version
        what = _what_was_lost(expert.meta, found)
        if not self._has_newest_claim(version):
            raise UnknownExpertError(
                f"{what}; this aggregator remembers version {version}: seeing which one remembers the newest"
            )
        if not expert.write_back(on=found.commit):
            raise StaleStateError(f"{self._store.name}: somebody else has just written it to Redis")
        logger.warning("%s: %s; written back from memory, version %d", self._store.name, what, version)

    def _has_newest_claim(self, version: int) -> bool:
        """True if no aggregator remembers a later version; all have had the time to say so."""
        is_new, newest = self._store.claim(self._holder, version)
        if is_new or self.claimed_at is None:
            self.claimed_at = self._clock()
        return self._clock() - self.claimed_at >= CLAIM_WAIT_S and newest == self._holder

    def _give_way(self, expert: Expert, found: Condition) -> None:
        """Redis goes on from a commit that this memory never saw: say so if it lacks what is in memory."""
        mine, theirs = expert.meta, found.meta
        if theirs is None:
            raise UnknownExpertError(
                f"expert {self._store.name!r} is partly gone from Redis ({found.damage}), and its weights are of a "
                f"commit that this aggregator does not know ({found.weights_commit}): write a backup back "
                "(fedmoe restore --replace)"
            )
        if theirs.lineage != mine.lineage or theirs.restored != mine.restored:
            logger.warning(
                "%s: an operator replaced it; going on from version %d, not from the version %d in memory",
                self._store.name, theirs.version, mine.version,
            )  # fmt: skip
            return
        lost = undone(expert.history.since("")[0], expert.applied, found.decided, self._load)
        if not lost:
            return
        announced = 0
        for line in lost:
            if update := self._load(line):
                self._store.announce(str(line["worker"]), *update)
                announced += 1
        logger.warning(
            "%s: Redis went back, and aggregator %s committed version %d before version %d could be written back from "
            "memory: %d updates are undone, of which %d are announced again from the kept updates; the others are "
            "lost, unless their workers still keep them",
            self._store.name, theirs.aggregator, theirs.version, mine.version, len(lost), announced,
        )  # fmt: skip

    def _load(self, line: Line) -> Update | None:
        """The kept update that a line of the log tells of, None if there is none."""
        if self._archive is None or "update" not in line:
            return None
        try:
            return self._archive.load(str(line["update"]))
        except UpdateError as error:
            logger.warning("%s: %s", self._store.name, error)
            return None


def _what_was_lost(mine: Meta, found: Condition) -> str:
    if not found.commit and not found.weights_commit:
        return "Redis had lost it"
    if found.damage:
        return f"it was damaged in Redis ({found.damage})"
    assert found.meta is not None
    return f"Redis went back from version {mine.version} to version {found.meta.version}"
