"""What an aggregator does with its retained state after Redis lost data.

If Redis was emptied, came back from an older file, or had a part of an expert overwritten, the aggregator that served
the expert retains more than Redis. Before it drops its retained state, `Recovery.settle` compares:

    Redis holds the retained commit, whole             nothing was lost
    Redis holds nothing, a part is missing or wrong,   Redis lost data: the aggregator that retains the newest version
    or it holds an earlier commit of this history      writes the expert back, on top of what Redis holds
    Redis holds a commit that is not in this history   another process committed, or an operator restored a backup:
                                                       Redis is right. Kept updates that Redis lacks are resent;
                                                       `prev` prevents counting them twice
    Redis holds the retained state under later rules,  an operator changed the rules or rolled the expert back: a
    or that state with one rollback more               commit of this history

`consumers.recovery.compare` decides which case applies. An aggregator that retains nothing waits after a reconnect, so
that others can claim a newer version, before it serves the expert.
"""

import logging
import time
from collections.abc import Callable, Sequence

from consumers.expert import Expert
from consumers.recovery.compare import (
    is_change_of_rules,
    is_of_this_history,
    rollback_of,
    undone,
    what_was_lost,
)
from consumers.recovery.write_back import write_back
from fedmoe.errors import DamagedExpertError, ProtocolError, StaleStateError, UnknownExpertError, UpdateError
from fedmoe.protocol.condition import Condition
from fedmoe.protocol.lines import AppliedLine, RollbackLine, RulesLine
from fedmoe.protocol.records import Meta
from fedmoe.protocol.update import Header
from fedmoe.store.archive import Archive
from fedmoe.store.commit import Loaded
from fedmoe.store.expert import ExpertStore

logger = logging.getLogger(__name__)

CLAIM_WAIT_S = 2.0  # enough for every aggregator to notice a loss and claim its retained version
LONGEST_CLAIM_S = 30.0  # after this wait a claim is ignored: its aggregator cannot write

Update = tuple[Header, list[bytes]]


class Recovery:
    """Lets one expert continue from the newest state that any aggregator retains or Redis holds.

    Args:
        store: of this expert.
        holder: unique name of this aggregator.
        archive: keeps applied updates (`--keep-updates`); None: they are not kept.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        store: ExpertStore,
        *,
        holder: str,
        archive: Archive | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.claimed_at: float | None = None  # when other aggregators could first see this one's claim
        self._generation = 0  # of the connection over which Redis's state was last compared
        self._patient_until = 0.0
        self._waits_since: float | None = None  # start of the wait for another aggregator's write-back
        self.store = store
        self._holder = holder
        self._archive = archive
        self._clock = clock

    def settle(self, expert: Expert) -> None:
        """Return once the retained state is not needed: Redis holds it, or a state that replaces it.

        This needs no lease: the server lost the lease too, and a standby that retains nothing may hold it now.

        Raises:
            UnknownExpertError: while it is undecided which aggregator writes the expert back.
            StaleStateError: if another process has just written to the expert.
        """
        found = self.store.whole_condition()  # what is dropped here could repair it
        if found.damage and found.meta and self._differs_by_rules(expert, found.meta):
            self._follow_rules(expert, found.meta)
            expert.meta = found.meta
            expert.history.arrive(found.commit)
        is_known = is_of_this_history(expert.history, expert.meta, found)
        if is_known and (found.commit != expert.meta.commit or found.damage):
            self._write_back(expert, found)
        elif not is_known:
            self._give_way(expert, found)
        self.claimed_at = None
        # Redis's state has been compared: there is no need to wait for other aggregators.
        self._generation, self._patient_until = self.store.connection.generation, 0.0

    def may_have_gone_back(self) -> bool:
        """True for CLAIM_WAIT_S after a reconnect of an aggregator that retains nothing.

        Redis may have come back from an older file. An aggregator that retains a newer version needs this time to claim
        it.
        """
        now, generation = self._clock(), self.store.connection.generation
        if self._generation not in (0, generation):
            self._patient_until = now + CLAIM_WAIT_S
        self._generation = generation
        return now < self._patient_until

    def wait_for_claims(self, loaded: Loaded) -> None:
        """Raise UnknownExpertError while another aggregator claims a later version, for at most LONGEST_CLAIM_S."""
        others = {who: version for who, version in loaded.claims.items() if who != self._holder}
        newest = max(others.values(), default=0)
        if newest <= loaded.meta.version:
            self._waits_since = None
            return
        self._waits_since = self._clock() if self._waits_since is None else self._waits_since
        if self._clock() - self._waits_since < LONGEST_CLAIM_S:
            raise UnknownExpertError(
                f"Redis has an older state of expert {self.store.name!r} (version {loaded.meta.version}), but another "
                f"aggregator retains version {newest} in memory: waiting at most {LONGEST_CLAIM_S:g} s until that "
                "aggregator has written it back",
                about=self.store.name,
            )

    def _write_back(self, expert: Expert, found: Condition) -> None:
        version = expert.meta.version
        what = what_was_lost(expert.meta, found)
        if not self._has_newest_claim(version):
            raise UnknownExpertError(
                f"{what}; this aggregator retains version {version} in memory and writes it back in {CLAIM_WAIT_S:g} "
                "s, unless another aggregator has a later version",
                about=self.store.name,
            )
        if not write_back(expert, on=found.commit, anchor=found.logged_version != version):
            raise StaleStateError(
                f"{self.store.name}: another process has just written the expert to Redis", about="commit"
            )
        logger.warning(
            "%s: %s; this aggregator wrote it back from memory at version %d, nothing to do",
            self.store.name, what, version,
        )  # fmt: skip

    def _has_newest_claim(self, version: int) -> bool:
        """True if no aggregator claims a later version, and all have had time to claim one."""
        is_new, newest = self.store.claim(self._holder, version)
        if is_new or self.claimed_at is None:
            self.claimed_at = self._clock()
        return self._clock() - self.claimed_at >= CLAIM_WAIT_S and newest == self._holder

    def _give_way(self, expert: Expert, found: Condition) -> None:
        """Accept a state of Redis outside this history; report and resend the retained updates that it lacks."""
        mine, theirs = expert.meta, found.meta
        if theirs is None or found.damage:
            raise DamagedExpertError(
                self.store.name,
                f"{found.damage} (this aggregator retains another history in memory and cannot repair it)",
            )
        if self._differs_by_rules(expert, theirs):
            self._follow_rules(expert, theirs)
            return
        line = rollback_of(mine, theirs, found.last_line)
        if expert.history.last == mine.commit and line is not None:
            self._follow_rollback(expert, theirs, line)
            return
        if theirs.lineage != mine.lineage or theirs.restored not in ("", mine.restored):
            logger.warning(
                "%s: an operator replaced the expert; going on from version %d, not from the version %d in memory",
                self.store.name, theirs.version, mine.version,
            )  # fmt: skip
            return
        if theirs.rules.number < mine.rules.number:
            logger.warning(
                "%s: Redis has an older state: rules %d are in force, but rules %d were in memory (the change: %s): "
                "check them with `fedmoe expert show`",
                self.store.name, theirs.rules.number, mine.rules.number, theirs.rules.differences(mine.rules),
            )  # fmt: skip
        if theirs.rolled_back.intervals[: len(mine.rolled_back.intervals)] != mine.rolled_back.intervals:
            logger.warning(
                "%s: Redis has an older state, from before the expert was rolled back to version %d: roll it back "
                "again (fedmoe expert rollback)",
                self.store.name, mine.rolled_back.latest[0],
            )  # fmt: skip
        lost = undone(expert.history.since("")[0], expert.decided, found.decided)
        if not lost and theirs.version >= mine.version:
            return
        logger.warning(
            "%s: Redis has an older state: version %d in memory, version %d in Redis, last committed by %s; %d updates "
            "are missing, %d of them are resent from --keep-updates; workers resend the others that they still keep",
            self.store.name, mine.version, theirs.version, theirs.aggregator or "nobody", len(lost),
            self._announce(lost, theirs),
        )  # fmt: skip

    @staticmethod
    def _differs_by_rules(expert: Expert, theirs: Meta) -> bool:
        return expert.history.last == expert.meta.commit and is_change_of_rules(expert.meta, theirs)

    def _follow_rules(self, expert: Expert, theirs: Meta) -> None:
        """Add an operator's commit, which follows the retained one, to the history."""
        mine = expert.meta
        changed = mine.rules.differences(theirs.rules)
        line = RulesLine(version=mine.version, changed=changed, ended=mine.rules)
        expert.history.attempt(theirs.commit, [line.to_fields()])
        logger.info(
            "%s: an operator changed the rules: %s (rules %d from version %d on)",
            self.store.name, changed, theirs.rules.number, theirs.version,
        )  # fmt: skip

    def _follow_rollback(self, expert: Expert, theirs: Meta, line: RollbackLine) -> None:
        """Add an operator's rollback, which follows the retained commit, to the history."""
        expert.history.attempt(theirs.commit, [line.to_fields()])
        logger.info(
            "%s: %s rolled the expert back to version %d: version %d has its weights, and what was trained on versions "
            "%d to %d is refused",
            self.store.name, line.by, line.rolled_back_to, line.version, line.rolled_back_to + 1, line.version - 1,
        )  # fmt: skip

    def _announce(self, lines: Sequence[AppliedLine], theirs: Meta) -> int:
        """Resend the kept updates of these lines, as the aggregators of this meta can decide them.

        Returns how many were resent; if Redis is full, fewer than are kept.
        """
        announced, latest = 0, theirs.version + theirs.rules.aggregation.staleness_bound(0)
        for line in lines:
            if update := self._load(line):
                header, parts = update
                header = header.at_most(latest).known_by(theirs.knows, parts)
                if not self.store.announce(line.worker, header, parts):
                    break
                announced += 1
        return announced

    def _load(self, line: AppliedLine) -> Update | None:
        """The kept update of a log line, None if it was not kept."""
        if self._archive is None or not line.update:
            return None
        try:
            return self._archive.load(line.update)
        except (UpdateError, ProtocolError) as error:  # the other kept updates can still be resent
            logger.warning("%s: %s", self.store.name, error)
            return None
