"""The files in which races are kept: the losses of one contestant's snapshots, and the loss to reach."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from fedmoe.util.disk import write_whole

Points = list[tuple[float, float, float]]


@dataclass(frozen=True, slots=True)
class Curve:
    """One contestant's losses.

    Args:
        race: its name; who: the contestant.
        goal: loss to reach.
        points: second, loss, and of the seconds those in which all waited for processes to start.
    """

    race: str
    who: str
    goal: float
    points: Points

    def file_name(self, label: str) -> str:
        """The name of its file; `label` is that of the plan."""
        return f"race-{self.race}-{re.sub('[^A-Za-z0-9.]+', '-', self.who)}-{label}.json"


def write(file: Path, curve: Curve) -> None:
    """Write the file; it is there whole or not at all."""
    write_whole(file, (json.dumps(asdict(curve)) + "\n").encode())


def read(file: Path) -> Curve | None:
    """A kept curve, None if there is none."""
    try:
        kept = json.loads(file.read_text())
        points = [(float(second), float(loss), float(starts)) for second, loss, starts in kept["points"]]
        return Curve(str(kept["race"]), str(kept["who"]), float(kept["goal"]), points)
    except (OSError, ValueError, TypeError, LookupError):
        return None


def kept_races(files: Iterable[Path]) -> list[Curve]:
    """The curves of those of these files that hold one."""
    return [curve for file in sorted(files) if (curve := read(file)) and curve.points]
