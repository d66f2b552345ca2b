"""What an expert's two streams of lines tell of its past: its applied updates, changes and refusals. Pure.

Every text here is printable: a worker wrote names and reasons.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedmoe.protocol.fields import number, whole
from fedmoe.protocol.lines import DeadLetter
from fedmoe.util.text import printable

KEPT_STEPS = 2000  # of one expert: the newest
KEPT_REFUSALS = 200
KEPT_CHANGES = 50

RawLine = tuple[bytes, Mapping[bytes, bytes]]  # as Redis gives it: id, fields
LineId = tuple[int, int]  # milliseconds since 1970, and the line's number in this millisecond


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """An applied update; None marks a missing field.

    Args:
        at: seconds since 1970, by the server's clock.
        version: of the expert after it.
        size: factor × norm, the length of the step that the expert took.
        val_loss, val_version: a validation loss, and the version it was measured on.
    """

    at: float
    version: int | None
    worker: str
    staleness: int | None = None
    loss: float | None = None
    examples: int = 0
    size: float = 0.0
    val_loss: float | None = None
    val_version: int | None = None
    val_rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """An operator's change, or the reason why the log begins again; `line` is the id in the log."""

    line: LineId
    at: float
    version: int | None
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A refused update, or garbage (`worker` is then empty); `line` is the id of the dead letter."""

    line: LineId
    at: float
    worker: str
    seq: int | None
    reason: str


@dataclass(slots=True)
class Chronicle:
    """The newest lines of one expert, oldest first; `edition` grows with every line that is added."""

    steps: deque[Step] = field(default_factory=lambda: deque(maxlen=KEPT_STEPS))
    changes: deque[Change] = field(default_factory=lambda: deque(maxlen=KEPT_CHANGES))
    refusals: deque[Refusal] = field(default_factory=lambda: deque(maxlen=KEPT_REFUSALS))
    edition: int = 0

    def add_log(self, lines: Iterable[RawLine]) -> None:
        """Add lines of the log, oldest first."""
        for line_id, fields in lines:
            self.edition += 1
            if b"worker" in fields:
                self.steps.append(_step(line_id, fields))
            elif text := _change(fields):
                self.changes.append(
                    Change(
                        line=_id(line_id),
                        at=_at(line_id),
                        version=whole(fields.get(b"version")),
                        text=printable(text),
                    )
                )

    def add_refusals(self, lines: Iterable[RawLine]) -> None:
        """Add dead letters, oldest first."""
        for line_id, fields in lines:
            self.edition += 1
            letter = DeadLetter.read(fields)
            self.refusals.append(
                Refusal(
                    line=_id(line_id), at=_at(line_id), worker=printable(letter.worker, 64), seq=letter.seq,
                    reason=printable(letter.reason or "no reason is given"),
                )
            )  # fmt: skip


def _step(line_id: bytes, fields: Mapping[bytes, bytes]) -> Step:
    factor, norm = number(fields.get(b"factor")), number(fields.get(b"norm"))
    return Step(
        at=_at(line_id),
        version=whole(fields.get(b"version")),
        worker=printable(fields[b"worker"], 64),
        staleness=whole(fields.get(b"staleness")),
        loss=number(fields.get(b"loss")),
        examples=whole(fields.get(b"n_examples")) or 0,
        size=abs((factor or 0.0) * (norm or 0.0)),
        val_loss=number(fields.get(b"val_loss")),
        val_version=whole(fields.get(b"val_version")),
        val_rows=whole(fields.get(b"val_rows")),
    )


def _change(fields: Mapping[bytes, bytes]) -> str:
    """What an operator changed, or why the log begins again; "" for a line of a later FedMoE."""

    def said(name: bytes) -> str:
        return fields[name].decode(errors="backslashreplace")

    if b"rolled_back_to" in fields:
        by = said(b"by") if b"by" in fields else "an operator"
        return f"rolled back to version {said(b'rolled_back_to')} by {by}"
    if b"changed" in fields:
        return f"rules changed: {said(b'changed')}"
    return f"the log begins again: {said(b'restored')}" if b"restored" in fields else ""


def _id(line_id: bytes) -> LineId:
    at_ms, _, number = line_id.partition(b"-")
    return int(at_ms), int(number)


def _at(line_id: bytes) -> float:
    return _id(line_id)[0] / 1000
