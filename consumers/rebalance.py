"""Heartbeats of this aggregator, and leases that follow the assignment."""

import logging
import threading
import time
from collections.abc import Callable

from consumers.assignment import Assignment
from fedmoe.errors import RedisUnavailableError, RedisUnfitError
from fedmoe.store.aggregators import Aggregators
from fedmoe.store.connection import Connection
from fedmoe.store.lease import Lease
from fedmoe.util.backoff import Backoff

logger = logging.getLogger(__name__)

# In leases: so a dead aggregator's heartbeat has ended, and the others have seen it, before its leases expire.
BEAT_LEASES = 0.2
TTL_LEASES = 0.6
# Of a Redis Cluster only the heartbeats' master may be away: then nobody waits longer for the heartbeats.
SILENT_LEASES = 2


class Rebalancer:
    """Sends this aggregator's heartbeat and reads those of the others; one command each time.

    Args:
        connection: used by this thread only.
        name: of this aggregator.
        lease_s: seconds until a lease expires.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        connection: Connection,
        name: str,
        *,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.assignment = Assignment(name, lease_s=lease_s)
        self.clock = clock
        self._lease_s = lease_s
        self._interval_s = BEAT_LEASES * lease_s
        self._silent_since: float | None = None  # the first heartbeat in a row that failed
        self._store = Aggregators(connection, holder=name, ttl_ms=int(TTL_LEASES * lease_s * 1000))
        self._backoff = Backoff("heartbeat of the aggregator", logger)
        self._generation = 0

    def run(self, stop: threading.Event) -> None:
        """Send heartbeats until `stop` is set."""
        while not stop.wait(self._interval_s):
            self.beat()

    def beat(self) -> None:
        """Send one heartbeat; a problem is logged, and the threads of the experts report it, too."""
        try:
            living = self._store.beat(self.assignment.present(self.clock()))
        except RedisUnfitError as error:
            self.assignment.is_blind()
            self._backoff.failed(error)
            return
        except RedisUnavailableError as error:
            self._backoff.failed(error)
            now = self.clock()
            if self._silent_since is None:
                self._silent_since = now
            is_long = now - self._silent_since > SILENT_LEASES * self._lease_s
            if is_long and self._store.others_answer():
                self.assignment.is_blind()
            return
        self._silent_since = None
        self._backoff.ok()
        generation = self._store.connection.generation
        self.assignment.see(living, self.clock(), reconnected=self._generation not in (0, generation))
        self._generation = generation

    def leave(self) -> None:
        """Remove the heartbeat if Redis can be reached, so that the others take over at once."""
        try:
            self._store.leave()
        except RedisUnavailableError as error:
            logger.debug("the heartbeat could not be removed; it expires: %s", error)


class AssignedLease(Lease):
    """A lease that is taken, kept and released as the assignment says.

    Args:
        rebalancer: of this aggregator.
        expert: whose lease it is, or `merged`.
    """

    def __init__(
        self,
        connection: Connection,
        key: str,
        *,
        holder: str,
        ttl_ms: int,
        rebalancer: Rebalancer,
        expert: str,
    ) -> None:
        super().__init__(connection, key, holder=holder, ttl_ms=ttl_ms, clock=rebalancer.clock)
        self._expert = expert
        self._assignment = rebalancer.assignment
        self._is_held = False
        self._assignment.add(expert, ttl_s=ttl_ms / 1000, now=self._clock())

    def hold(self) -> bool:
        """As the assignment says; asks Redis nothing while another aggregator is to have the lease."""
        if self._assignment.wants(self._expert, self._clock()):
            return self.keep()
        if self._is_held:
            logger.info("%s: released for another aggregator", self._expert)
            self.release()
        return False

    def renew(self) -> bool:
        """Take or renew the lease, also one that the assignment gives to another: a batch is finished first."""
        self._is_held = super().renew()
        self._assignment.has(self._expert, self._is_held, self._clock())
        return self._is_held

    def release(self) -> None:
        """Release the lease; the next heartbeat says so."""
        super().release()
        self._is_held = False
        self._assignment.has(self._expert, False, self._clock())

    def cannot(self) -> None:
        """Release the lease; the heartbeats say that this aggregator cannot serve the expert."""
        self._assignment.cannot(self._expert, self._clock())
        super().cannot()


def lease(
    connection: Connection,
    key: str,
    *,
    holder: str,
    ttl_s: float,
    rebalancer: Rebalancer | None,
    expert: str,
    clock: Callable[[], float] = time.monotonic,
) -> Lease:
    """The lease of an expert; without a rebalancer it is taken whenever it is free."""
    ttl_ms = int(ttl_s * 1000)
    if rebalancer is None:
        return Lease(connection, key, holder=holder, ttl_ms=ttl_ms, clock=clock)
    return AssignedLease(connection, key, holder=holder, ttl_ms=ttl_ms, rebalancer=rebalancer, expert=expert)
