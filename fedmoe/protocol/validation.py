"""Validation losses: a worker measures the loss of the expert on rows that it never trains on. Pure.

A worker measures the base that it pulled, and names the loss, the version and the rows in the header of an update. The
aggregator writes them into the log, and keeps a summary beside the worker's last decided update (`Curve`). A worker is
compared with itself only, because the rows of two workers differ.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeGuard

from fedmoe.protocol.fields import known_fields

WARN, HOLD = ON_WORSE = ("warn", "hold")
MAX_LOSS = 1000.0  # a loss above is no mean cross entropy: that of a uniform guess over 2^32 tokens is 22
MAX_SET_CHARS = 16
# The same rows are measured each time, so what differs between two versions is not the choice of rows. docs/operate.md
# says how far the loss of a version that is no worse was seen above the best.
MARGIN = 0.03  # of the best loss
IN_A_ROW = 2  # so many measurements above it, of different versions, make a worker's loss worse
AGREEING = 2  # so many workers hold an expert


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One measurement of a worker.

    Args:
        loss: weighted mean cross entropy of the label tokens (nats).
        version: of the expert that was measured.
        rows: number of rows that it was measured on; rows_set: digest of them.
    """

    loss: float
    version: int
    rows: int
    rows_set: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a header, and of a line of the log, that hold it."""
        return {
            "val_loss": self.loss,
            "val_version": self.version,
            "val_rows": self.rows,
            "val_set": self.rows_set,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The summary of a worker's measurements on the same rows, since its first, or an operator's release or rollback.

    Args:
        rows, rows_set: as in `Measured`.
        best, best_version: the lowest loss, and the version it was measured on.
        last, last_version: the newest loss.
        worse: how many of the newest measurements in a row are above the best by more than MARGIN.
        since: version of the expert at the release or rollback since when measurements count, 0 if there was none.
    """

    rows: int
    best: float
    best_version: int
    last: float
    last_version: int
    rows_set: str = ""
    worse: int = 0
    since: int = 0

    @property
    def is_worse(self) -> bool:
        """True if the loss has risen above the best by more than noise."""
        return self.worse >= IN_A_ROW

    @property
    def trend(self) -> str:
        """One word for people: best, near the best, above the best, or worse."""
        if self.last_version == self.best_version:
            return "best"
        if not self.worse:
            return "near the best"
        return "worse" if self.is_worse else "above the best"

    def __str__(self) -> str:
        if self.last_version == self.best_version:
            return f"{self.last:.4f} at version {self.last_version}, the best"
        return f"{self.last:.4f} at version {self.last_version}, best {self.best:.4f} at version {self.best_version}"

    def to_json(self) -> str:
        """The curve as text, with sorted fields."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Curve | None":
        """Parse what `to_json` gave, also by a later FedMoE; None if it is "" or malformed."""
        if not text:
            return None
        try:
            return cls(**known_fields(cls, json.loads(text)))
        except (TypeError, ValueError, AttributeError, RecursionError):
            return None


def checked(
    loss: object, version: object, rows: object, rows_set: object, *, at_most: int
) -> Measured | str | None:
    """A measurement from an untrusted header, the reason why it does not count, or None if there is none.

    `at_most` is the expert's version: no later one can have been measured.
    """
    if loss is None:
        return None
    if not isinstance(loss, float) or not 0 <= loss <= MAX_LOSS:
        return f"a validation loss of {_shown(loss)}, which must be a number of at least 0 and at most {MAX_LOSS:g}"
    if not _is_count(version) or version > at_most:
        return f"a validation loss at version {_shown(version)}, but the expert is at version {at_most}"
    if not _is_count(rows) or rows == 0:
        return f"a validation loss on {_shown(rows)} rows"
    text = rows_set if isinstance(rows_set, str) else ""
    return Measured(loss=loss, version=version, rows=rows, rows_set=text[:MAX_SET_CHARS])


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**53


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) and not math.isnan(value) else ascii(value)[:40]


def advance(curve: Curve | None, measured: Measured, *, since: int) -> Curve | None:
    """The curve after a measurement.

    Args:
        curve: before it, None if there is none.
        measured: the measurement. One of a version that is not later than the last one changes nothing.
        since: version of the expert at the operator's last release or rollback; earlier measurements do not count.
    """
    if measured.version < since:
        return curve
    if curve is None or (curve.rows_set, curve.since) != (measured.rows_set, since):
        return Curve(
            rows=measured.rows, rows_set=measured.rows_set, since=since,
            best=measured.loss, best_version=measured.version, last=measured.loss, last_version=measured.version,
        )  # fmt: skip
    if measured.version <= curve.last_version:
        return curve
    after = replace(curve, rows=measured.rows, last=measured.loss, last_version=measured.version)
    if measured.loss < curve.best:
        return replace(after, best=measured.loss, best_version=measured.version, worse=0)
    return replace(after, worse=curve.worse + 1 if measured.loss > curve.best * (1 + MARGIN) else 0)


def best_version(curves: Mapping[str, Curve]) -> int | None:
    """The version that is best for the workers together: the lower median of their best versions; None without curves.

    The losses of two workers cannot be compared. The median is that of a majority, so that one worker with odd rows,
    or a forged loss, does not choose it.
    """
    versions = sorted(curve.best_version for curve in curves.values())
    return versions[(len(versions) - 1) // 2] if versions else None
