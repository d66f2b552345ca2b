"""Serves one expert: the loop that holds the lease, loads, reads, decides and commits."""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from consumers.decide import Outcome
from consumers.expert import Expert
from consumers.history import History
from consumers.recovery.settle import Recovery
from consumers.recovery.write_back import rebuild
from consumers.retention import Retention
from fedmoe.errors import (
    FedMoEError,
    ProtocolError,
    RemovedExpertError,
    StaleStateError,
)
from fedmoe.protocol.records import Entry
from fedmoe.settings import AggregatorSettings
from fedmoe.store.archive import Archive
from fedmoe.store.connection import Connection
from fedmoe.store.expert import BLOCKING_MS, ExpertStore
from fedmoe.store.lease import Lease
from fedmoe.store.problems import Problems
from fedmoe.util.backoff import Backoff

logger = logging.getLogger(__name__)


class ExpertServer:
    """Serves one expert: holds the lease, loads, reads, commits; loads again when its retained state may be wrong.

    Args:
        connection: of this thread alone.
        holder: name of this process, unique.
        retained: the state that it retains from before, as if it had served until now.
        decided: told how many updates each commit decided.
    """

    def __init__(
        self,
        connection: Connection,
        name: str,
        settings: AggregatorSettings,
        *,
        holder: str,
        retained: Expert | None = None,
        decided: Callable[[int], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._settings = settings
        self._holder = holder
        self._decided = decided
        self._clock = clock
        self._connection = connection
        self._store = ExpertStore(connection, name)
        self._archive = Archive(settings.keep_updates / name) if settings.keep_updates else None
        self._retention = (
            Retention(self._archive, settings.keep_updates_for_s)
            if self._archive and settings.keep_updates_for_s
            else None
        )
        self._lease = Lease(
            connection, self._store.keys.lease, holder=holder, ttl_ms=int(settings.lease_s * 1000)
        )
        self._problems = Problems(connection, self._store.keys.problem, holder=holder, clock=clock)
        self._expert = retained
        self._loaded = False
        self._standing_by = False
        self._reclaimed_at = 0.0
        self._held_at = 0.0
        self._history = History()
        self._recovery = Recovery(self._store, holder=holder, archive=self._archive, clock=clock)

    @property
    def retained(self) -> Expert | None:
        """The state that it retains, None if it has not loaded one or has forgotten it."""
        return self._expert

    @property
    def is_serving(self) -> bool:
        """True while its retained state is that of Redis, as far as it knows."""
        return self._loaded

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set, or in burst mode until nothing is waiting."""
        backoff = Backoff(self.name, logger)
        while not stop.is_set():
            try:
                done = self.turn(stop)
                backoff.ok()
                self._problems.solved()
                if done and self._settings.burst:
                    break
            except StaleStateError as error:
                logger.info("%s; loading again", error)
                self._loaded = False
            except ProtocolError as error:
                self._loaded = False
                self._lease.give_up()  # to an aggregator that speaks it
                stop.wait(backoff.failed(error) + self._settings.lease_s / 4)
            except RemovedExpertError as error:
                logger.warning("%s", error)
                self._problems.solved()  # what came of it until that was seen
                break
            except FedMoEError as error:
                self._loaded = False
                self._problems.report(str(error))
                if stop.is_set():
                    logger.warning("%s: %s", self.name, error)
                else:
                    stop.wait(backoff.failed(error))
            except Exception as error:  # a bug must cost one expert a few seconds, never the daemon
                logger.exception("%s: unexpected error", self.name)
                self._loaded, self._expert = False, None
                self._problems.report(
                    f"unexpected error, see the traceback in this aggregator's log: {error!r}"
                )
                stop.wait(backoff.failed(error))
        self._lease.give_up()

    def turn(self, stop: threading.Event) -> bool:
        """One read and its commit; True if nothing was waiting."""
        if not self._loaded and self._expert is not None:
            self._rescue(self._expert)
        is_holder, may_have_gone_back = self._hold(), self._recovery.may_have_gone_back()
        if not is_holder:
            if not self._standing_by:
                logger.info("%s: standing by, another aggregator serves it", self.name)
            self._standing_by, self._loaded = True, False
            stop.wait(min(0.2, self._settings.lease_s / 4))
            return False
        self._standing_by = False
        if not self._loaded and may_have_gone_back:
            stop.wait(0.1)
            return False
        if self._loaded and self._expert and self._expert.generation != self._connection.generation:
            raise StaleStateError(f"{self.name}: the connection to Redis was opened again")
        entries = self._load() if not self._loaded else []
        assert self._expert is not None
        if not entries and self._is_time_to_reclaim():
            entries = self._reclaim()
        if not entries:
            block_ms = 1 if self._settings.burst else self._settings.block_ms
            entries = self._store.read(block_ms=block_ms, count=self._settings.batch)
        self._look_for_block(entries)
        for first in range(0, len(entries), self._settings.batch):
            some = entries[first : first + self._settings.batch]
            verdicts = self._expert.process(some, more=self._more(self._settings.batch - len(some)))
            if self._retention is not None:
                self._retention.tend(self._expert)
            self._decided(sum(v.outcome in (Outcome.APPLIED, Outcome.REFUSED) for v in verdicts))
        return not entries

    def _hold(self) -> bool:
        self._held_at = self._clock()
        return self._lease.hold()

    def _keep_lease(self) -> None:
        """Renew it in time: a batch of large updates takes longer, and a standby would do all of it again.

        Whoever has lost it goes on all the same: if both gave up whenever the other has it, neither might ever commit.
        """
        if self._clock() - self._held_at > self._settings.lease_s / 4:
            self._hold()

    def _look_for_block(self, entries: Sequence[Entry]) -> None:
        if any(entry.ms >= BLOCKING_MS for entry in entries):
            self._reclaimed_at = -math.inf  # look soon whether somebody blocked the stream

    def _more(self, room: int) -> Callable[[], Sequence[Entry]]:
        """Reads what has come since the last read, without waiting, `room` entries in all.

        Not for longer than a quarter of the lease: whoever waits for the first of them shall not wait for long.
        """
        left, until = room, self._clock() + self._settings.lease_s / 4

        def read() -> Sequence[Entry]:
            nonlocal left
            if not left or self._clock() > until:
                return ()
            entries = self._store.read(block_ms=None, count=left)
            self._look_for_block(entries)
            left -= len(entries)
            return entries

        return read

    def _rescue(self, expert: Expert) -> None:
        """Before the retained state is dropped: is it needed, because Redis lost it?"""
        self._recovery.settle(expert)
        self._expert = None

    def _load(self) -> list[Entry]:
        # Anew each time: whoever emptied Redis may have made an expert of this name with another spec.
        expert = Expert(
            self._store, self._store.spec(), aggregator=self._holder, archive=self._archive,
            history=self._history, before_each=self._keep_lease,
        )  # fmt: skip
        loaded = expert.load()
        self._recovery.wait_for_claims(loaded)
        if expert.is_behind:
            expert.process(())  # from now on, workers see what this aggregator speaks and knows
        self._expert, self._loaded = expert, True
        meta = expert.meta
        logger.info("%s: serving from version %d, under rules %d", self.name, meta.version, meta.rules.number)
        if rebuilt := rebuild(expert, loaded):
            logger.warning(
                "%s: in Redis, %s did not match version %d; repaired from that version on, nothing to do",
                self.name,
                rebuilt,
                loaded.meta.version,
            )
        return self._reclaim()

    def _is_time_to_reclaim(self) -> bool:
        """Once in the time of a lease, so that no update waits longer than it does when an aggregator dies."""
        return self._clock() - self._reclaimed_at > self._settings.lease_s

    def _reclaim(self) -> list[Entry]:
        """What was read and not committed, also by who has lost the lease; and a look at what no reply tells of."""
        self._reclaimed_at = self._clock()
        expert = self._expert
        assert expert is not None
        meta, n_decided = expert.meta, len(expert.decided)
        if not self._store.is_unchanged(
            commit=meta.commit, weights_commit=meta.weights_commit, n_decided=n_decided
        ):
            raise StaleStateError(f"{self.name}: Redis holds another state than this aggregator retains")
        if self._store.mend():
            logger.warning(
                "%s: an entry with the highest id blocked its stream; repaired, nothing to do", self.name
            )
        return self._store.reclaim()
