"""What a stream entry announces. An entry is an untrusted doorbell: its fields decide nothing."""

from dataclasses import dataclass

from fedmoe.protocol.fields import optional, to_text
from fedmoe.protocol.names import is_name
from fedmoe.protocol.records import Entry
from fedmoe.protocol.update import Header, is_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Doorbell:
    """An update waits under the worker's own keys; the fields other than its name are for people and are not read."""

    worker: str
    run: str
    seq: int
    base_version: int | None = optional(None)
    format: str = optional("")
    parts: int | None = optional(None)
    bytes: int | None = optional(None)
    n_examples: int | None = optional(None)
    steps: int | None = optional(None)
    loss: float | None = optional(None)

    @classmethod
    def of(cls, header: Header, worker: str) -> "Doorbell":
        """The entry that announces this update."""
        return cls(
            worker=worker,
            run=header.run,
            seq=header.seq,
            base_version=header.base_version,
            format=header.wire_format,
            parts=len(header.parts),
            bytes=header.payload_bytes,
            n_examples=header.n_examples,
            steps=header.steps,
            loss=round(header.loss, 4),
        )

    def to_fields(self) -> dict[str, str]:
        """The entry as Redis stores it."""
        return to_text(self, sparse=True)

    @property
    def update(self) -> tuple[str, str, int]:
        """Worker, run and seq."""
        return self.worker, self.run, self.seq


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """A worker joined: the aggregator reads its heartbeat; `software` is for people."""

    worker: str
    software: str = optional("")

    def to_fields(self) -> dict[str, str]:
        """The entry as Redis stores it."""
        return {"join": "1"} | to_text(self, sparse=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """An entry that announces nothing."""

    reason: str


def parse_entry(entry: Entry) -> Doorbell | Join | Garbage:
    """Parse a stream entry; never raises."""
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
