"""Serves one expert: the loop that holds the lease, loads, reads, decides and commits."""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from consumers.compaction import Compaction
from consumers.decide import Outcome, Verdict
from consumers.expert import Expert
from consumers.history import History
from consumers.rebalance import Rebalancer, lease
from consumers.recovery.settle import Recovery
from consumers.recovery.write_back import keep_rolled_back, rebuild
from consumers.retention import Retention
from consumers.waiting import Waiting
from fedmoe.errors import (
    FedMoEError,
    ProtocolError,
    RedisUnavailableError,
    RedisUnfitError,
    RemovedExpertError,
    StaleStateError,
    UnknownExpertError,
)
from fedmoe.protocol.records import Entry
from fedmoe.settings import AggregatorSettings
from fedmoe.store.archive import Archive
from fedmoe.store.connection import Connection
from fedmoe.store.expert import BLOCKING_MS, ExpertStore
from fedmoe.store.problems import Problems
from fedmoe.util.backoff import Backoff
from fedmoe.util.threads import ALONE, Threads

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Tally:
    """What a server has done since its start: decided updates by outcome, committed batches, and their seconds."""

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    batches: int = 0
    seconds: float = 0.0

    def add(self, verdicts: Sequence[Verdict], seconds: float) -> None:
        """Count a batch."""
        self.outcomes.update(verdict.outcome for verdict in verdicts)
        self.batches += 1
        self.seconds += seconds


class ExpertServer:
    """Serves one expert: holds the lease, loads, reads, commits; reloads when its retained state may be stale.

    Args:
        connection: used by this thread only.
        holder: unique name of this process.
        retained: retained state to start with, as if this server had served the expert until now.
        rebalancer: shares the experts with other aggregators; None: take the lease whenever it is free.
        decided: called with the number of updates that each commit decided.
        threads: fold and pack what is large.

    Attributes:
        retained: the retained state; None if none was loaded, or it was dropped.
        is_serving: the retained state equals that of Redis, as far as is known.
        tally: what it has done; any thread may read it.
        store, problems, history, recovery, compaction: what it works with.
    """

    def __init__(
        self,
        connection: Connection,
        name: str,
        settings: AggregatorSettings,
        *,
        holder: str,
        retained: Expert | None = None,
        rebalancer: Rebalancer | None = None,
        decided: Callable[[int], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        threads: Threads = ALONE,
    ) -> None:
        self.name = name
        self._settings = settings
        self._holder = holder
        self._decided = decided
        self._clock = clock
        self._threads = threads
        self.store = ExpertStore(connection, name)
        self._archive = Archive(settings.keep_updates / name) if settings.keep_updates else None
        self._retention = (
            Retention(self._archive, settings.keep_updates_for_s)
            if self._archive and settings.keep_updates_for_s
            else None
        )
        self._rebalancer = rebalancer
        self.lease = lease(
            connection, self.store.keys.lease, holder=holder, ttl_s=settings.lease_s, rebalancer=rebalancer,
            expert=name, clock=clock,
        )  # fmt: skip
        self.problems = Problems(connection, self.store.keys.problem, holder=holder, clock=clock)
        self.retained = retained
        self.is_serving = False
        self.tally = Tally()
        self._standing_by = False
        self.reclaimed_at = 0.0
        self._waiting = Waiting(clock)
        self.history = History()
        self.compaction = Compaction(clock)
        self.recovery = Recovery(self.store, holder=holder, archive=self._archive, clock=clock)

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set, or in burst mode until no entry waits."""
        backoff = Backoff(self.name, logger)
        while not stop.is_set():
            try:
                done = self.turn(stop)
                backoff.ok()
                self.problems.solved()
                if done and self._settings.burst:
                    break
            except StaleStateError as error:
                logger.info("%s; loading again", error)
                self.is_serving = False
            except ProtocolError as error:
                self.is_serving = False
                self.lease.cannot()  # an aggregator that speaks this protocol can take it
                stop.wait(backoff.failed(error) + self._settings.lease_s / 4)
            except RemovedExpertError as error:
                logger.warning("%s", error)
                self.problems.solved()  # problems that the removal caused before it was noticed
                break
            except FedMoEError as error:
                self.is_serving = False
                self.problems.report(str(error))
                if stop.is_set():
                    logger.warning("%s: %s", self.name, error)
                else:
                    stop.wait(backoff.failed(error))
                    self._leave_to_another(error, backoff)
            except Exception as error:  # a bug may pause one expert for seconds but must not end the daemon
                logger.exception("%s: unexpected error", self.name)
                self.is_serving, self.retained = False, None
                self.problems.report(
                    f"unexpected error, see the traceback in this aggregator's log: {error!r}"
                )
                stop.wait(backoff.failed(error))
                self._leave_to_another(error, backoff)
        self.lease.give_up()

    def _leave_to_another(self, error: Exception, backoff: Backoff) -> None:
        """After a lease of failures, leave the expert to an aggregator that may not have the problem.

        An unreachable Redis and a lost or damaged expert are the same for all aggregators.
        """
        is_of_all = isinstance(error, RedisUnavailableError | UnknownExpertError)
        if (
            (is_of_all and not isinstance(error, RedisUnfitError))
            or backoff.since is None
            or not self._rebalancer
        ):
            return
        lasted_s = time.monotonic() - backoff.since
        if lasted_s > self._settings.lease_s and self._rebalancer.assignment.is_another_able(self.name):
            self.lease.cannot()

    def turn(self, stop: threading.Event) -> bool:
        """Read once and commit; True if no entry was waiting."""
        if not self.is_serving and self.retained is not None:
            self.rescue(self.retained)
        is_holder, may_have_gone_back = self._hold(), self.recovery.may_have_gone_back()
        if not is_holder:
            if not self._standing_by:
                logger.info("%s: standing by, another aggregator serves it", self.name)
            self._standing_by, self.is_serving = True, False
            stop.wait(min(0.2, self._settings.lease_s / 4))
            return False
        self._standing_by = False
        if not self.is_serving and may_have_gone_back:
            stop.wait(0.1)
            return False
        if self.is_serving and self.retained and self.retained.generation != self.store.connection.generation:
            raise StaleStateError(
                f"{self.name}: the connection to Redis was opened again", about="connection"
            )
        entries = self._load() if not self.is_serving else []
        assert self.retained is not None
        self.compaction.tend(self.retained)
        if self.retained.is_held:
            return self._rest(stop)
        if not entries and self.is_time_to_reclaim():
            entries = self._reclaim()
        if not entries:
            block_ms = 1 if self._settings.burst else self._settings.block_ms
            entries = self._read(block_ms, self._settings.batch)
        self._look_for_block(entries)
        waits_since, has_applied = self._waiting.oldest, False
        for first in range(0, len(entries), self._settings.batch):
            some = entries[first : first + self._settings.batch]
            began = time.perf_counter()
            verdicts = self.retained.process(some, more=self.more(self._settings.batch - len(some)))
            self.tally.add(verdicts, time.perf_counter() - began)
            if any(verdict.outcome is Outcome.APPLIED for verdict in verdicts):
                has_applied = True
                self.compaction.committed()
            if self._retention is not None:
                self._retention.tend(self.retained)
            self._decided(sum(v.outcome in (Outcome.APPLIED, Outcome.REFUSED) for v in verdicts))
        if has_applied and self._rebalancer:  # garbage may wait
            self._rebalancer.assignment.waited(
                self.name, self._clock() - waits_since,
                sync_interval_s=self.retained.meta.rules.sync_interval_s, now=self._rebalancer.clock(),
            )  # fmt: skip
        return not entries

    def _rest(self, stop: threading.Event) -> bool:
        """Leave the stream of a held expert as it is; look now and then whether an operator has released it."""
        if self.is_time_to_reclaim():
            self._reclaim()
        stop.wait(self._settings.block_ms / 1000)
        self._waiting.begin()
        return True

    def _hold(self) -> bool:
        """Take or keep the lease; between two batches, because here an expert is handed over."""
        if not self.is_serving:
            self.lease.doubt()
        return self.lease.hold()

    def _keep_lease(self) -> None:
        """Keep the lease during a batch: large updates can outlast it, and a standby would then repeat the work.

        Losing the lease does not abort the batch; otherwise two aggregators that alternate as holder could livelock.
        """
        self.lease.keep()

    def _read(self, block_ms: int | None, count: int) -> list[Entry]:
        return self._waiting.read(lambda: self.store.read(block_ms=block_ms, count=count), count)

    def _look_for_block(self, entries: Sequence[Entry]) -> None:
        if any(entry.ms >= BLOCKING_MS for entry in entries):
            self.reclaimed_at = -math.inf  # check for a blocked stream at the next turn

    def more(self, room: int) -> Callable[[], Sequence[Entry]]:
        """Return a function that reads new entries without waiting, at most `room` in all.

        It stops after a quarter of the lease, so that the first worker of the batch does not wait too long.
        """
        left, until = room, self._clock() + self._settings.lease_s / 4

        def read() -> Sequence[Entry]:
            nonlocal left
            if not left or self._clock() > until:
                return ()
            entries = self._read(None, left)
            self._look_for_block(entries)
            left -= len(entries)
            return entries

        return read

    def rescue(self, expert: Expert) -> None:
        """Drop the retained state, after writing it back if Redis lost it."""
        self.recovery.settle(expert)
        self.retained = None

    def _load(self) -> list[Entry]:
        # The spec is read each time: after Redis was emptied, an expert of this name may have another spec.
        expert = Expert(
            self.store, self.store.spec(), aggregator=self._holder, archive=self._archive,
            history=self.history, before_each=self._keep_lease, threads=self._threads,
        )  # fmt: skip
        loaded = expert.load()
        self.recovery.wait_for_claims(loaded)
        keep_rolled_back(expert)
        if expert.is_behind:
            expert.process(())  # commits meta, so that workers see this aggregator's protocol and features
        self.retained, self.is_serving = expert, True
        self._waiting.begin()
        self.compaction.look(expert)
        meta = expert.meta
        logger.info("%s: serving from version %d, under rules %d", self.name, meta.version, meta.rules.number)
        if rebuilt := rebuild(expert, loaded):
            logger.warning(
                "%s: in Redis, %s did not match version %d; rebuilt from that version on, nothing to do",
                self.name,
                rebuilt,
                loaded.meta.version,
            )
        return self._reclaim()

    def is_time_to_reclaim(self) -> bool:
        """Reclaim once per lease duration, so that a dead aggregator delays no update by more than that."""
        return self._clock() - self.reclaimed_at > self._settings.lease_s

    def _reclaim(self) -> list[Entry]:
        """Claim entries that were read but never committed, including those of a former lease holder.

        First check for a changed or emptied Redis and for a blocked stream, which no reply reports.
        """
        self.reclaimed_at = self._clock()
        expert = self.retained
        assert expert is not None
        if not self.store.is_unchanged(expert.meta, n_decided=len(expert.decided)):
            raise StaleStateError(
                f"{self.name}: Redis holds another state than this aggregator retains", about="rollback"
            )
        self.compaction.look(expert)
        if self.store.mend():
            logger.warning(
                "%s: an entry with the highest id blocked its stream; repaired, nothing to do", self.name
            )
        return self.store.reclaim()
