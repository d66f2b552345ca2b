"""Decides when an aggregator writes an expert's weights although no update makes it: compaction of the tail.

It also decides whether an expert may have a tail at all.
"""

import logging
from collections.abc import Callable

from consumers.expert import Expert
from fedmoe.protocol.features import COPIES
from fedmoe.protocol.formats import EXACT
from fedmoe.store.commit import Commit
from fedmoe.store.refusals import is_refusal
from fedmoe.util.text import printable

logger = logging.getLogger(__name__)

QUIET_INTERVALS = 10  # sync intervals without an update
SHOWN_WORKERS = 5


class Compaction:
    """When to compact the tail of one expert: in a quiet time, or if Redis has no room for it.

    An expert without a tail is what every tool can read under `weights`, and nobody waits for the commit.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.committed_at = 0.0
        self._clock = clock
        self._may_begin = False  # a tail, because no worker of an earlier release is there
        self._told: set[str] = set()  # workers of an earlier release that the log names
        self._has_told_refusal = False

    def committed(self) -> None:
        """Updates were just committed."""
        self.committed_at = self._clock()

    def look(self, expert: Expert) -> None:
        """Ask how full Redis is, and whether all workers know tails; call it now and then."""
        expert.writes_weights = expert.store.is_nearly_full() or not self._may_have_tail(expert)

    def _may_have_tail(self, expert: Expert) -> bool:
        """False while no part of a tail is a copy, and workers of an earlier release train it: that would stop them.

        Once none is there, a worker of an earlier release is told to upgrade, and nobody is asked again.
        """
        has_copies = COPIES in expert.meta.requires.split()
        if not self._may_begin and not has_copies and expert.spec.wire_format != EXACT:
            beats = expert.store.heartbeats(["knows"])
            lacking = {worker for worker, beat in beats.items() if COPIES not in beat.knows.split()}
            if lacking - self._told:
                logger.info(
                    "%s: each commit writes the weights until workers of an earlier release are upgraded: %s",
                    expert.store.name, ", ".join(map(printable, sorted(lacking)[:SHOWN_WORKERS])),
                )  # fmt: skip
            self._told = lacking
            if lacking:
                return False
        self._may_begin = True
        return True

    def tend(self, expert: Expert) -> None:
        """Compact the tail if it is time; raises what a commit raises."""
        if expert.store.was_full:  # it will be asked again how full it is
            expert.store.was_full, expert.writes_weights = False, True
        self._tell_refusal(expert)
        if not expert.meta.tail:
            return
        quiet_s = self._clock() - self.committed_at
        if expert.writes_weights or quiet_s > QUIET_INTERVALS * expert.meta.rules.sync_interval_s:
            tail = expert.meta.tail
            compact(expert)
            logger.info(
                "%s: wrote the weights of version %d, and removed the %d updates of its tail",
                expert.store.name, expert.meta.version, expert.meta.version - tail.snapshot_version,
            )  # fmt: skip

    def _tell_refusal(self, expert: Expert) -> None:
        """Warn once if this user of Redis may not copy updates: each commit then writes the weights."""
        refused, expert.copies_refused = expert.copies_refused, None
        if refused is not None and is_refusal(refused) and not self._has_told_refusal:
            self._has_told_refusal = True
            logger.warning(
                "%s: this user of Redis may not copy updates (%s), so each commit writes the weights: give it the "
                "rights of this release (fedmoe operator refresh)",
                expert.store.name, printable(str(refused)),
            )  # fmt: skip


def compact(expert: Expert) -> None:
    """Write the weights and remove the tail, in a commit that changes no value; raises what `send` raises."""
    commit = Commit(on=expert.meta.commit, generation=expert.generation, meta=expert.meta)
    expert.send(commit, expert.write_weights(commit, expert.next_meta()))
