"""What an aggregator does with its retained state when Redis has lost that.

A Redis that was emptied, that came back from an older file, or in which a part of an expert was overwritten holds less
than the aggregator that served the expert. Before an aggregator drops its retained state, `Recovery.settle` compares:

    Redis holds the retained commit, whole             nothing was lost
    Redis holds nothing, a part is missing or wrong,   Redis lost something: the aggregator that retains the newest
    or it holds an earlier commit of this history      version writes the expert back, on top of what Redis holds
    Redis holds a commit that was never seen here      somebody else committed, or an operator restored a backup:
                                                       Redis is right. Kept updates that it lacks are announced
                                                       again; `prev` keeps them from counting twice
    Redis holds the retained state under later rules   an operator changed them: a commit of this history

*Earlier commit of this history* means: a commit that this retained state passed through. To compare versions would not
do: it would undo `fedmoe restore --replace`.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from consumers.expert import Expert
from fedmoe.errors import DamagedExpertError, ProtocolError, StaleStateError, UnknownExpertError, UpdateError
from fedmoe.protocol.lines import AppliedLine, RulesLine, read_line
from fedmoe.protocol.records import Decided, Meta
from fedmoe.protocol.update import Header, UpdateId
from fedmoe.store.archive import Archive
from fedmoe.store.expert import ExpertStore
from fedmoe.store.lifecycle import Condition, Line

logger = logging.getLogger(__name__)

CLAIM_WAIT_S = 2.0  # in which every aggregator finds out what Redis lost, and claims what it retains

Update = tuple[Header, list[bytes]]


def undone(
    lines: Sequence[Line], mine: Mapping[str, Decided], theirs: Mapping[str, Decided]
) -> list[AppliedLine]:
    """The lines of applied updates that Redis lacks: it holds an earlier update of their workers as the last decided.

    Args:
        lines: of the retained log, oldest first.
        mine: the last decided update of each worker, as retained.
        theirs: the last decided update of each worker in Redis.
    """
    heads = {worker: theirs[worker].id if worker in theirs else None for worker in mine}
    behind = {worker for worker, head in heads.items() if _is_before(head, mine[worker].id)}
    lost: list[AppliedLine] = []
    for line in map(read_line, reversed(lines)):
        if not isinstance(line, AppliedLine) or line.worker not in behind:
            continue
        head = heads[line.worker]
        if head is not None and (line.run, line.seq) == head:
            behind.discard(line.worker)
            continue
        lost.append(line)
        if line.prev == str(head or ""):
            behind.discard(line.worker)
    return lost[::-1]


def _is_before(head: UpdateId | None, last: UpdateId) -> bool:
    """True if a worker's update comes before another one of its life; one of a run of the same number does not."""
    if head is None:
        return True
    return head.seq < last.seq if head.run == last.run else head.incarnation < last.incarnation


def is_change_of_rules(mine: Meta, theirs: Meta) -> bool:
    """True if the state in Redis is the retained one under rules of a later number: only an operator's commit is."""
    same = replace(theirs, commit=mine.commit, rules=mine.rules, updated_at=mine.updated_at)
    # As Redis has them: it holds numbers with fewer digits.
    return theirs.rules.number > mine.rules.number and same.to_hash() == mine.to_hash()


class Recovery:
    """Compares what an aggregator retains of one expert with what Redis holds.

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
        self.claimed_at: float | None = None  # since when the other aggregators can see this one's claim
        self._store = store
        self._holder = holder
        self._archive = archive
        self._clock = clock

    def settle(self, expert: Expert) -> None:
        """Return when the retained state is needed no more: Redis holds it, or something that replaces it.

        Needs no lease: the server lost that too, and a standby that retains nothing may have taken it.

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
        """True if the retained state passed through the commit in Redis; without meta, that of the weights counts."""
        if expert.history.last != expert.meta.commit:
            return False
        if found.commit:
            return found.commit in expert.history
        known = found.weights_commit in expert.history or found.weights_commit == expert.meta.weights_commit
        return known or not found.weights_commit

    def _write_back(self, expert: Expert, found: Condition) -> None:
        version = expert.meta.version
        what = _what_was_lost(expert.meta, found)
        if not self._has_newest_claim(version):
            raise UnknownExpertError(
                f"{what}; this aggregator retains version {version} in memory and writes it back in {CLAIM_WAIT_S:g} "
                "s, unless another one has a later version"
            )
        if not expert.write_back(on=found.commit, anchor=found.logged_version != version):
            raise StaleStateError(f"{self._store.name}: another process has just written the expert to Redis")
        logger.warning(
            "%s: %s; this aggregator wrote it back from memory at version %d, nothing to do",
            self._store.name, what, version,
        )  # fmt: skip

    def _has_newest_claim(self, version: int) -> bool:
        """True if no aggregator claims a later version; all have had the time to do so."""
        is_new, newest = self._store.claim(self._holder, version)
        if is_new or self.claimed_at is None:
            self.claimed_at = self._clock()
        return self._clock() - self.claimed_at >= CLAIM_WAIT_S and newest == self._holder

    def _give_way(self, expert: Expert, found: Condition) -> None:
        """Redis goes on from a commit that was never seen here: say so if it lacks what is retained."""
        mine, theirs = expert.meta, found.meta
        if theirs is None or found.damage:
            raise DamagedExpertError(
                self._store.name,
                f"{found.damage} (this aggregator retains another history in memory and cannot repair it)",
            )
        if expert.history.last == mine.commit and is_change_of_rules(mine, theirs):
            self._follow_rules(expert, theirs)
            return
        if theirs.lineage != mine.lineage or theirs.restored not in ("", mine.restored):
            logger.warning(
                "%s: an operator replaced the expert; going on from version %d, not from the version %d in memory",
                self._store.name, theirs.version, mine.version,
            )  # fmt: skip
            return
        if theirs.rules.number < mine.rules.number:
            logger.warning(
                "%s: Redis has an older state, and rules %d are in force, in memory were rules %d (the change: %s): "
                "check them with `fedmoe expert show`",
                self._store.name, theirs.rules.number, mine.rules.number, theirs.rules.differences(mine.rules),
            )  # fmt: skip
        lost = undone(expert.history.since("")[0], expert.decided, found.decided)
        if not lost and theirs.version >= mine.version:
            return
        logger.warning(
            "%s: Redis has an older state: version %d in memory, version %d in Redis, last committed by %s; %d updates "
            "are missing, %d of them are sent again from --keep-updates; workers that still have the others send those "
            "again",
            self._store.name, mine.version, theirs.version, theirs.aggregator or "nobody", len(lost),
            self._announce(lost, theirs.version + theirs.rules.aggregation.staleness_bound(0)),
        )  # fmt: skip

    def _follow_rules(self, expert: Expert, theirs: Meta) -> None:
        """An operator's commit on the retained one: go on from it, with it in the history."""
        mine = expert.meta
        changed = mine.rules.differences(theirs.rules)
        line = RulesLine(version=mine.version, changed=changed, ended=mine.rules)
        expert.history.attempt(theirs.commit, [line.to_fields()])
        logger.info(
            "%s: an operator changed the rules: %s (rules %d from version %d on)",
            self._store.name, changed, theirs.rules.number, theirs.version,
        )  # fmt: skip

    def _announce(self, lines: Sequence[AppliedLine], latest: int) -> int:
        """Announce the kept updates of these lines again, with bases of at most version `latest`.

        Returns how many; they are fewer than are kept if Redis is full.
        """
        announced = 0
        for line in lines:
            if update := self._load(line):
                header, parts = update
                if not self._store.announce(line.worker, header.at_most(latest), parts):
                    break
                announced += 1
        return announced

    def _load(self, line: AppliedLine) -> Update | None:
        """The kept update of a log line, None if it was not kept."""
        if self._archive is None or not line.update:
            return None
        try:
            return self._archive.load(line.update)
        except (UpdateError, ProtocolError) as error:  # the others can still be sent again
            logger.warning("%s: %s", self._store.name, error)
            return None


def _what_was_lost(mine: Meta, found: Condition) -> str:
    if not found.commit and not found.weights_commit:
        return "the expert was missing from Redis"
    if found.damage:
        return f"the expert was damaged in Redis ({found.damage})"
    assert found.meta is not None
    return f"Redis had an older state of the expert (version {found.meta.version}, in memory {mine.version})"
