"""What one aggregator knows of the assignment, and what follows for each lease: take, keep, or give it up. Pure.

The present time is an argument: seconds, monotonic. Any thread may call any method.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from fedmoe.protocol.assignment import AggregatorBeat, assign
from fedmoe.util.software import software

OVERDUE_INTERVALS = 3  # an update that waited for so many sync intervals, and for OVERDUE_LEASES, is overdue
OVERDUE_LEASES = 2
PATIENCE_LEASES = 12  # an exception (unable, kept, a lower limit) lasts this long before the next attempt
RAISE_LEASES = (
    24  # after so long without an overdue update the limit rises by one; twice as long after each fall
)
LONGEST_RAISE_LEASES = 720
AFTER_RECONNECT_S = 2.0  # time for the aggregators that retain a newer state than Redis to claim it


@dataclass(slots=True)
class _Expert:
    """What this aggregator knows of one expert; times are in seconds, 0 for never.

    Args:
        ttl_s: of its lease.
        asked_at: when its thread last asked for the lease.
        held_until: when the lease expires unless it is renewed.
        had: this aggregator held the lease when it last asked, so it may retain the expert's state.
        free_since: since when no living aggregator serves it, None if one does.
        unable_until: until then this aggregator says that it is unable.
        kept_until: until then this aggregator keeps it, because the assigned one did not take it.
        overdue_at: when an overdue update of it was seen.
    """

    ttl_s: float
    asked_at: float
    held_until: float = 0.0
    had: bool = False
    free_since: float | None = None
    unable_until: float = 0.0
    kept_until: float = 0.0
    overdue_at: float = 0.0


class Assignment:
    """The assignment as one aggregator sees it.

    Until the first heartbeat was read, and while they cannot be read for lack of a right, it takes every lease that
    is free and gives none up, like an aggregator that knows of no other.

    Args:
        name: of this aggregator.
        lease_s: seconds until a lease expires.
    """

    def __init__(self, name: str, *, lease_s: float) -> None:
        self._name = name
        self._lease_s = lease_s
        self._lock = threading.RLock()
        self._experts: dict[str, _Expert] = {}
        self._living: Mapping[str, AggregatorBeat] = {}
        self._assigned: dict[str, str] | None = None
        self._seen_at = 0.0
        self._patient_until = 0.0
        self._limit: int | None = None
        self._limit_changed_at = 0.0
        self._overdue_at = 0.0
        self._raise_leases = RAISE_LEASES
        self._since = time.time()

    def add(self, expert: str, *, ttl_s: float, now: float) -> None:
        """A thread serves this expert from now on; its lease expires after ttl_s seconds."""
        with self._lock:
            self._experts[expert] = _Expert(ttl_s=ttl_s, asked_at=now)
            self._assign()

    def remove(self, expert: str) -> None:
        """No thread serves this expert any more."""
        with self._lock:
            self._experts.pop(expert, None)
            self._assign()

    def _assign(self) -> None:
        if self._assigned is not None:
            self._assigned = assign(self._living, self._experts.keys())

    # ---- what the expert's thread asks and says

    def wants(self, expert: str, now: float) -> bool:
        """True if this aggregator should take or keep the lease now."""
        with self._lock:
            one = self._experts[expert]
            one.asked_at = now
            if self._assigned is None:
                return True
            is_mine = self._assigned.get(expert) == self._name
            if one.had:
                return is_mine or one.kept_until > now
            if now < self._patient_until:
                return False
            return is_mine or self._is_forsaken(one, now)

    def _is_forsaken(self, one: _Expert, now: float) -> bool:
        """True if the aggregator that should serve the expert has not taken it within a lease, and this one may."""
        if one.free_since is None or one.unable_until > now or now - self._seen_at > self._lease_s:
            return False
        return now - one.free_since > one.ttl_s

    def has(self, expert: str, is_held: bool, now: float) -> None:
        """The lease was asked for, with this result."""
        with self._lock:
            one = self._experts[expert]
            one.asked_at = now
            had, one.had = one.had, is_held
            one.held_until = now + one.ttl_s if is_held else 0.0
            if not is_held and one.free_since is not None:
                one.free_since = now  # held by one that sends no heartbeats: whose it is takes it first
            if is_held and not had and (self._assigned or {}).get(expert, self._name) != self._name:
                one.kept_until = now + PATIENCE_LEASES * self._lease_s

    def cannot(self, expert: str, now: float) -> None:
        """This aggregator cannot serve the expert; it says so in its heartbeats for a while."""
        with self._lock:
            one = self._experts[expert]
            one.unable_until = now + PATIENCE_LEASES * self._lease_s
            one.had, one.held_until, one.kept_until = False, 0.0, 0.0

    def is_another_able(self, expert: str) -> bool:
        """True if another living aggregator does not say that it is unable to serve the expert."""
        with self._lock:
            return any(expert not in beat.unable for name, beat in self._living.items() if name != self._name)

    def waited(self, expert: str, waited_s: float, *, sync_interval_s: float, now: float) -> None:
        """An update that was just decided had waited this long for this aggregator."""
        if waited_s > max(OVERDUE_INTERVALS * sync_interval_s, OVERDUE_LEASES * self._lease_s):
            with self._lock:
                self._experts[expert].overdue_at = self._overdue_at = now

    # ---- heartbeats

    def present(self, now: float) -> AggregatorBeat:
        """This aggregator's heartbeat."""
        with self._lock:
            if (
                now - self._seen_at > self._lease_s
            ):  # this process slept, or Redis: that is no fault of a thread
                for one in self._experts.values():
                    one.asked_at = now
            serves = frozenset(name for name, one in self._experts.items() if one.held_until > now)
            self._adjust_limit(len(serves), now)
            patience_s = PATIENCE_LEASES * self._lease_s
            return AggregatorBeat(
                serves=serves,
                retains=frozenset(name for name, one in self._experts.items() if one.had) - serves,
                unable=frozenset(
                    name
                    for name, one in self._experts.items()
                    if one.unable_until > now or now - one.asked_at > one.ttl_s
                ),
                overdue=frozenset(
                    name
                    for name in serves
                    if (at := self._experts[name].overdue_at) and now - at < patience_s
                ),
                limit=self._limit,
                since=self._since,
                software=software(),
            )

    def _adjust_limit(self, n_served: int, now: float) -> None:
        """Lower the limit by one while updates are overdue, at most once per PATIENCE_LEASES; else raise it slowly."""
        others = self._living.keys() - {self._name}
        unchanged_s = now - self._limit_changed_at if self._limit_changed_at else float("inf")
        is_overdue = bool(self._overdue_at) and now - self._overdue_at < self._lease_s
        if is_overdue and others and n_served and unchanged_s > PATIENCE_LEASES * self._lease_s:
            self._limit = n_served - 1
            self._limit_changed_at = now
            self._raise_leases = min(LONGEST_RAISE_LEASES, 2 * self._raise_leases)
        elif (
            self._limit is not None
            and min(unchanged_s, now - self._overdue_at) > self._raise_leases * self._lease_s
        ):
            self._limit += 1
            self._limit_changed_at = now
            if self._limit >= len(self._experts):
                self._limit, self._raise_leases = None, RAISE_LEASES

    def see(self, living: Mapping[str, AggregatorBeat], now: float, *, reconnected: bool = False) -> None:
        """Read the heartbeats of all that live.

        After a reconnect this aggregator takes no lease for AFTER_RECONNECT_S, because Redis may have come back with an
        older state, which another aggregator must then have time to replace.
        """
        with self._lock:
            if reconnected:
                self._patient_until = now + AFTER_RECONNECT_S
            self._living, self._seen_at = living, now
            self._assigned = assign(living, self._experts.keys())
            served = frozenset().union(*(beat.serves for beat in living.values()))
            for name, one in self._experts.items():
                is_free = name not in served
                one.free_since = (now if one.free_since is None else one.free_since) if is_free else None

    def is_blind(self) -> None:
        """The heartbeats cannot be read until somebody changes a right or a key."""
        with self._lock:
            self._assigned, self._living = None, {}
