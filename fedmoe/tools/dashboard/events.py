"""What happened in a federation: what its streams tell, and what differs between two looks. Pure."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedmoe.protocol.chronicle import Chronicle, LineId
from fedmoe.tools.dashboard.picture import Picture

KEPT = 500
FIRST = 50  # of the past, when the dashboard starts


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened.

    Args:
        at: seconds since 1970.
        kind: refused, changed, joined, left, quiet, back, served, unserved, redis.
        is_bad: an operator may want to look at it.
        expert, worker: which it is about, "" for none.
        text: a sentence.
    """

    at: float
    kind: str
    text: str
    is_bad: bool = False
    expert: str = ""
    worker: str = ""


class Events:
    """The newest events, each with a number that grows."""

    def __init__(self) -> None:
        self._events: deque[tuple[int, Event]] = deque(maxlen=KEPT)
        self._next = 1
        self._lock = threading.Lock()
        self._told: dict[tuple[str, str], LineId] = {}  # expert, stream → the last line told

    def add(self, events: Iterable[Event]) -> None:
        """Add events, oldest first."""
        with self._lock:
            for event in events:
                self._events.append((self._next, event))
                self._next += 1

    def tell(self, chronicles: Mapping[str, Chronicle]) -> None:
        """Add what is new in the chronicles; the first time their newest FIRST lines."""
        found: list[Event] = []
        for name, chronicle in chronicles.items():
            for what, events in (
                ("dead", _of_refusals(name, chronicle)),
                ("log", _of_changes(name, chronicle)),
            ):
                since = self._told.get((name, what), (0, 0))
                new = [(line, event) for line, event in events if line > since]
                if new:
                    self._told[name, what] = new[-1][0]
                found += [event for _, event in new]
        found.sort(key=lambda event: event.at)
        self.add(found if self._events else found[-FIRST:])

    def newest(self, most: int = KEPT, *, after: int = 0) -> list[dict[str, Any]]:
        """The newest events with a number above `after`, newest first."""
        with self._lock:
            found = [one for one in self._events if one[0] > after]
        return [record(*one) for one in found[::-1][:most]]

    @property
    def last(self) -> int:
        """The number of the newest event, 0 for none."""
        return self._next - 1


def record(number: int, event: Event) -> dict[str, Any]:
    """An event for JSON."""
    return {
        "number": number, "at": event.at, "kind": event.kind, "is_bad": event.is_bad, "expert": event.expert,
        "worker": event.worker, "text": event.text,
    }  # fmt: skip


def _of_refusals(name: str, chronicle: Chronicle) -> list[tuple[LineId, Event]]:
    return [
        (one.line, Event(
            at=one.at, kind="refused", is_bad=True, expert=name, worker=one.worker,
            text=f"{name}: update {one.seq} of {one.worker} was refused: {one.reason}"
            if one.worker else f"{name}: an entry was garbage: {one.reason}",
        ))
        for one in chronicle.refusals
    ]  # fmt: skip


def _of_changes(name: str, chronicle: Chronicle) -> list[tuple[LineId, Event]]:
    return [
        (one.line, Event(at=one.at, kind="changed", expert=name, text=f"{name}: {one.text}"))
        for one in chronicle.changes
    ]


def differences(before: Picture, after: Picture, now: float) -> Iterator[Event]:
    """What differs between two looks: experts, who serves them, workers that came, went quiet, or left."""
    for name, expert in after.experts.items():
        old = before.experts.get(name)
        if old is None:
            yield Event(at=now, kind="added", expert=name, text=f"expert {name} is new")
        elif old["served_by"] != expert["served_by"]:
            who = expert["served_by"]
            yield Event(
                at=now, kind="served" if who else "unserved", is_bad=not who, expert=name,
                text=f"{name}: {who} serves it" if who else f"{name}: no aggregator serves it any more",
            )  # fmt: skip
    for name in before.experts.keys() - after.experts.keys():
        yield Event(at=now, kind="removed", is_bad=True, expert=name, text=f"expert {name} is gone")
    for key, worker in after.workers.items():
        if event := _of_worker(before.workers.get(key), worker, now):
            yield event


def _of_worker(old: dict[str, Any] | None, new: dict[str, Any], now: float) -> Event | None:
    name, expert, state = new["name"], new["expert"], new["state"]
    was = old["state"] if old else ""
    if was == state or (old is None and not new["is_alive"]):
        return None
    about = f"{expert}: worker {name}"
    if not new["is_alive"]:
        reason = f": {new['problem']}" if new["problem"] else ""
        how = {"vanished": "stopped sending heartbeats", "refused": "was refused and ended"}.get(state, state)
        kind, text = "left", f"{about} {how}{reason}"
    elif not (old and old["is_alive"]):
        kind, text = "joined", f"{about} joined"
    elif state == "quiet":
        kind, text = "quiet", f"{about} has not been heard of for {new['last_seen_s']:.0f} s"
    elif was == "quiet":
        kind, text = "back", f"{about} is back"
    else:
        return None
    is_bad = kind in ("left", "quiet") and not new["is_well"]
    return Event(at=now, kind=kind, is_bad=is_bad, expert=expert, worker=name, text=text)
