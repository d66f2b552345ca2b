"""Which aggregator is to serve which expert. Pure.

Each aggregator computes the assignment for itself from the heartbeats of all that live, so nobody coordinates. The
leases say who does serve an expert; the assignment only says who should take a lease and who should give one up.
It is a sticky assignment, as Kafka's consumer groups have it: an aggregator keeps what it serves up to its quota.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregatorBeat:
    """An aggregator's heartbeat, one field of the hash `fedmoe:aggregators`.

    A name of an expert may also be `merged`, the merged gateway.

    Args:
        serves: the experts whose lease it holds.
        retains: the experts that it served last, whose lease ended because it could not be renewed in time.
        unable: experts that it cannot serve now: it lacks a right, is too old, or their thread hangs.
        overdue: experts that it serves too slowly: their updates waited for several sync intervals.
        limit: the most experts that it takes, because it could not keep up with more; None: no limit.
        since: when it started, by its clock (seconds since 1970).
        software: the releases it runs on.
    """

    serves: frozenset[str] = frozenset()
    retains: frozenset[str] = frozenset()
    unable: frozenset[str] = frozenset()
    overdue: frozenset[str] = frozenset()
    limit: int | None = None
    since: float = 0.0
    software: str = ""

    def to_json(self) -> str:
        """The heartbeat as Redis stores it."""
        return json.dumps(
            {
                "serves": sorted(self.serves),
                "retains": sorted(self.retains),
                "unable": sorted(self.unable),
                "overdue": sorted(self.overdue),
                "limit": self.limit,
                "since": round(self.since, 3),
                "software": self.software,
            }
        )

    @classmethod
    def read(cls, text: bytes | str) -> "AggregatorBeat":
        """Read a heartbeat; a field that is missing or malformed counts as not given, so none stops an aggregator."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError):
            raw = None
        if not isinstance(raw, dict):
            return cls()

        def names(field: str) -> frozenset[str]:
            found = raw.get(field)
            return (
                frozenset(one for one in found if isinstance(one, str))
                if isinstance(found, list)
                else frozenset()
            )

        limit, since, software = raw.get("limit"), raw.get("since"), raw.get("software")
        return cls(
            serves=names("serves"),
            retains=names("retains"),
            unable=names("unable"),
            overdue=names("overdue"),
            limit=max(0, limit) if isinstance(limit, int) else None,
            since=float(since) if isinstance(since, int | float) and abs(since) < 2**53 else 0.0,
            software=software if isinstance(software, str) else "",
        )


def kept(living: Mapping[str, AggregatorBeat]) -> dict[str, frozenset[str]]:
    """What each aggregator would keep: what it serves, and what it retains if nobody serves that."""
    served = frozenset().union(*(beat.serves for beat in living.values()))
    return {name: beat.serves | (beat.retains - served) for name, beat in sorted(living.items())}


def quotas(living: Mapping[str, AggregatorBeat], n_experts: int) -> dict[str, int]:
    """How many experts each living aggregator is to serve: even within one, up to the limits.

    Where the number does not divide, one that serves more keeps one more, so that the fewest experts move. If all
    aggregators are at their limits, the rest is spread evenly beyond the limits.
    """
    held = kept(living)
    quota = dict.fromkeys(held, 0)

    def order(name: str) -> tuple[int, int, bool]:
        limit, n = living[name].limit, quota[name]
        beyond = 0 if limit is None else max(0, n + 1 - limit)
        return beyond, n, len(held[name]) <= n

    for _ in range(n_experts if living else 0):
        quota[min(quota, key=order)] += 1
    return quota


def assign(living: Mapping[str, AggregatorBeat], experts: Collection[str]) -> dict[str, str]:
    """The aggregator that is to serve each of these experts; empty if none lives.

    Every aggregator keeps what it serves or retains up to its quota, overdue experts last. The others, and those that
    nobody serves, go to those with room, in the order of names: so the assignment stays the same while it is carried
    out, one expert after the other. An expert goes to an aggregator that says it is unable only if all are.
    """
    quota = quotas(living, len(experts))
    able = {
        expert: [name for name in quota if expert not in living[name].unable] or list(quota)
        for expert in experts
    }
    given: dict[str, str] = {}
    room = dict(quota)
    for name, held in kept(living).items():
        overdue = living[name].overdue
        mine = (e for e in held & able.keys() if name in able[e] and e not in given)
        for expert in sorted(mine, key=lambda e: (e in overdue, e))[: quota[name]]:
            given[expert] = name
            room[name] -= 1
    for expert in sorted(able.keys() - given.keys(), key=lambda e: (len(able[e]), e)):
        if names := able[expert]:
            given[expert] = next((name for name in names if room[name] > 0), max(names, key=room.__getitem__))
            room[given[expert]] -= 1
    return given
