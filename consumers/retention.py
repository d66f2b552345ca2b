"""Retention of kept updates: old updates are removed, and weights are kept from which a replay can start."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from consumers.expert import Expert
from consumers.held import Held
from fedmoe.store.archive import WEIGHTS_SUFFIX, Anchor, Archive

logger = logging.getLogger(__name__)

ANCHORS = 7  # per retention period; so updates are kept for up to a seventh longer
AT_ONCE = 100  # files removed after one commit, so that the next commit is not delayed
MARGIN_S = 3600.0  # two aggregators may share one directory, and their clocks differ


class Retention:
    """Maintains the archive of one expert, in small steps after each commit.

    Args:
        archive: of this expert.
        keep_s: updates are kept for at least this time (seconds).
        clock: seconds since 1970.
    """

    def __init__(self, archive: Archive, keep_s: float, *, clock: Callable[[], float] = time.time) -> None:
        self._archive = archive
        self._keep_s = keep_s
        self._clock = clock
        self.expired: list[Path] = []
        self._next_at = 0.0

    def tend(self, expert: Expert) -> None:
        """Keep the expert's weights if an anchor is due, and remove some files past their retention period.

        Call this right after a commit. A disk error is logged, and serving continues.
        """
        try:
            if self.expired:
                self._remove_some()
            elif self._clock() >= self._next_at:
                self._look(expert)
        except OSError as error:
            logger.warning(
                "%s: cannot remove old updates or write weights in %s (%s): check the disk and its permissions; "
                "serving goes on",
                expert.store.name, self._archive.directory, error.strerror or error,
            )  # fmt: skip
            self._next_at = self._clock() + 60.0

    def _look(self, expert: Expert) -> None:
        now, every = self._clock(), self._keep_s / ANCHORS
        self.mark_expired(now - self._keep_s)  # first, because the removals may make room for the weights
        newest = max((anchor.at for anchor in self._archive.anchors().values()), default=float("-inf"))
        if now - newest >= every:
            if not self._keep_weights(expert, now):
                return  # it is tried again after one of the next commits
            newest = now
        self._next_at = newest + every

    def _keep_weights(self, expert: Expert, now: float) -> bool:
        """Keep the present weights as an anchor; False if the update that made them is unknown."""
        version = expert.meta.version
        last = next(
            (
                decided.id
                for decided in expert.decided.values()
                if decided.how == "applied" and decided.version == version
            ),
            None,
        )
        if last is None:
            return False
        weights, state = keep_values(self._archive, expert.held)
        self._archive.keep_anchor(
            Anchor(
                version=version,
                lineage=expert.meta.lineage,
                run=last.run,
                seq=last.seq,
                weights=weights,
                server_state=state,
                optimizer=expert.held.optimizer,
                at=now,
            )
        )
        return True

    def mark_expired(self, until: float) -> None:
        """List for removal the files that a replay from the newest anchor before `until` does not need."""
        anchors = self._archive.anchors()
        first = next(
            (anchor for anchor in reversed(anchors.values()) if anchor.at <= until and anchor.lineage), None
        )
        if first is None:
            return
        # A replay starts at the oldest anchor, so earlier anchors are removed before their updates.
        self.expired = [file for file, anchor in anchors.items() if anchor.at < first.at]
        needed = {
            digest + WEIGHTS_SUFFIX
            for anchor in anchors.values()
            if anchor.at >= first.at
            for digest in (anchor.weights, anchor.server_state)
        }
        old = self._archive.kept_before(first.at - min(MARGIN_S, self._keep_s / 10))
        self.expired += [file for file in old if file.name not in needed]
        if self.expired:
            logger.info(
                "%s: removing %d files from before version %d",
                self._archive.directory,
                len(self.expired),
                first.version,
            )

    def _remove_some(self) -> None:
        for file in self.expired[:AT_ONCE]:
            file.unlink(missing_ok=True)
        del self.expired[:AT_ONCE]


def keep_values(archive: Archive, held: Held) -> tuple[str, str]:
    """Keep an expert's weights and server state; returns their digests, "" for a state that is not there.

    Raises:
        OSError: if the disk is full or gone.
    """
    state = held.state_file
    return archive.keep_weights(held.weights.file), archive.keep_weights(state) if state is not None else ""
