"""The losses that are known of an expert's present version: the one home of where they are read. Pure."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedmoe.protocol.fields import number, whole
from fedmoe.protocol.records import Meta
from fedmoe.protocol.rollback import NEVER, RolledBack


def training_loss(meta: Meta) -> float | None:
    """The training loss that the last applied update reported (nats per token), None if there is none."""
    return meta.loss if math.isfinite(meta.loss) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Losses on held-out rows.

    Args:
        version: the latest version that was measured.
        losses: who measured on which rows -> loss (nats per token); losses on other rows cannot be compared.
    """

    version: int
    losses: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Mean of the losses."""
        return sum(self.losses.values()) / len(self.losses)

    def gain_over(self, before: "Validation") -> float | None:
        """By how much the loss has fallen, on the rows that both were measured on; None if there are none."""
        both = self.losses.keys() & before.losses.keys()
        return sum(before.losses[rows] - self.losses[rows] for rows in both) / len(both) if both else None

    def to_json(self) -> dict[str, object]:
        """As fedmoe.json has it."""
        return {"version": self.version, "losses": dict(self.losses)}

    @classmethod
    def from_json(cls, content: object) -> "Validation | None":
        """Read what `to_json` gave, None if it is something else."""
        match content:
            case {"version": int(version), "losses": dict(losses)} if losses:
                if all(isinstance(loss, float) and math.isfinite(loss) for loss in losses.values()):
                    return cls(version=version, losses=losses)
        return None


def validation(
    lines: Iterable[Mapping[str, str]], version: int, rolled_back: RolledBack = NEVER
) -> Validation | None:
    """What the workers measured last, at this version or before; None if nobody measures.

    What was measured on a version that was rolled back does not count: its training is no longer there.

    A worker measures the version that it pulled, and the loss comes with its next update. So lines of the log hold
    `val_loss`, the `val_version` that was measured and `val_set`, a digest of the rows.
    """
    latest: dict[str, tuple[int, float]] = {}
    for line in lines:
        measured, loss = whole(line.get("val_version")), number(line.get("val_loss"))
        if measured is None or loss is None or measured > version or rolled_back.holds(measured):
            continue
        rows = f"{line.get('worker', '')} {line.get('val_set', '')}"
        if rows not in latest or latest[rows][0] <= measured:
            latest[rows] = (measured, loss)
    if not latest:
        return None
    return Validation(
        version=max(measured for measured, _ in latest.values()),
        losses={rows: loss for rows, (_, loss) in latest.items()},
    )
