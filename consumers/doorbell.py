"""What a stream entry announces. It only rings the bell: anybody may have written it, so nothing else in it counts."""

from dataclasses import dataclass

from fedmoe.names import is_name
from fedmoe.records import Entry
from fedmoe.update import is_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Doorbell:
    """An update waits under the worker's own keys."""

    worker: str
    run: str
    seq: int

    @property
    def update(self) -> tuple[str, str, int]:
        """Worker, run and seq."""
        return self.worker, self.run, self.seq


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """A worker joined and asks that its heartbeat be looked at."""

    worker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """Not an entry of FedMoE's."""

    reason: str


def parse_entry(entry: Entry) -> Doorbell | Join | Garbage:
    """Tell what an entry announces; never raises."""
    worker = entry.fields.get("worker", "")
    if not is_name(worker):
        return Garbage(
            reason="the entry names no worker" if not worker else "the entry's worker is not a name"
        )
    if "join" in entry.fields:
        return Join(worker=worker)
    run, seq = entry.fields.get("run", ""), entry.fields.get("seq", "")
    if not is_run(run) or not (
        seq.isascii() and seq.isdigit() and 0 < int(seq[:20]) < 2**53 and len(seq) < 17
    ):
        return Garbage(reason="the entry's run and seq do not name an update")
    return Doorbell(worker=worker, run=run, seq=int(seq))
