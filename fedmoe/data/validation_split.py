"""Chooses the rows that a worker holds back from training, to measure the validation loss on them. Pure.

Whether a row is held back depends on a hash of its content: it lies in [0, 1), and the row is held back if it is below
a threshold. So neither a restart nor another order of the rows changes the split, and equal rows are on the same side.
Where rows name their source (a file, a document), and there are enough of them, the hash is that of the source: then
no row that is trained on comes from a source of the validation rows.

The threshold is the share, or in a small file the hash of the eighth row, but at most 0.1; in a large one it is lower,
for at most MOST_ROWS rows. It never rises when rows are added. So a row that was trained on is never held back later,
unless the rows come to be split by source, or no longer.
"""

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

from fedmoe.data.encode import HASHES, Example
from fedmoe.data.flat import FlatExamples
from fedmoe.errors import DataError
from fedmoe.util.hold_back import HoldBack

LEAST_ROWS = 8  # fewer say little
MOST_ROWS = 64  # of a share; more take longer to measure, and say little more
LARGEST_SHARE = 0.1  # that LEAST_ROWS may take of a small file
LEAST_SOURCES = 20  # with fewer of them, or with a larger one than LARGEST_SOURCE, rows are split one by one
LARGEST_SOURCE = 0.1  # of the rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The examples of a file in two parts.

    Args:
        training, validation: the examples, in the order of the file.
        rows: number of different rows that are held back; of: number of different rows of the file.
        by_source: true if whole sources were held back.
        digest: first 8 hex digits of a SHA-256 of the validation examples, "" if there are none.
    """

    training: Sequence[Example]
    validation: FlatExamples
    rows: int
    of: int
    by_source: bool = False
    digest: str = ""

    def __str__(self) -> str:
        if not self.rows:
            return f"no row is held back for validation, of {self.of}: all are trained on"
        how = ", by their source" if self.by_source else ""
        return f"{self.rows} of {self.of} different rows are held back for validation{how}: they are not trained on"


class Chosen(Sequence[Example]):
    """Some of the examples, by their numbers."""

    def __init__(self, examples: FlatExamples, numbers: Sequence[int]) -> None:
        self._examples = examples
        self._numbers = array("q", numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._examples[number] for number in self._numbers[index]]
        return self._examples[self._numbers[index]]


def split(examples: FlatExamples, wanted: HoldBack, *, where: str) -> Split:
    """Split the examples; all examples of a row, and of equal rows, are on the same side.

    `where` names the file in the error.

    Raises:
        DataError: if no row is left to train on.
    """
    rows, sources = examples.arrays["rows"], examples.arrays["sources"]
    units = dict(zip(rows, sources, strict=True))  # row -> source, each different row once
    by_source = _is_by_source(units.values())
    hashes = {row: source if by_source and source else row for row, source in units.items()}
    limit = _limit(sorted(hashes.values()), wanted)
    held = {row for row, number in hashes.items() if number < limit}
    if len(held) == len(units):
        raise DataError(
            f"--validate leaves no row of {where} to train on: it has {len(units)} different rows; hold fewer back, or "
            "0 for none",
            about="validate",
        )
    if not held:
        return Split(training=examples, validation=FlatExamples(), rows=0, of=len(units))
    validation = FlatExamples()
    validation.extend(examples[number] for number, row in enumerate(rows) if row in held)
    return Split(
        training=Chosen(examples, [number for number, row in enumerate(rows) if row not in held]),
        validation=validation,
        rows=len(held),
        of=len(units),
        by_source=by_source,
        digest=validation.digest()[:8],
    )


def _is_by_source(sources: Iterable[int]) -> bool:
    counts = Counter(sources)
    total = sum(counts.values())
    counts.pop(0, None)
    return len(counts) >= LEAST_SOURCES and max(counts.values()) <= LARGEST_SOURCE * total


def _limit(hashes: Sequence[int], wanted: HoldBack) -> int:
    """The threshold: what is below is held back."""

    def at_most(count: int) -> int:
        return hashes[count] if count < len(hashes) else HASHES

    if wanted.rows or not wanted.share:
        return at_most(wanted.rows)
    least = at_most(LEAST_ROWS - 1) + 1  # it and all before it
    limit = max(math.ceil(wanted.share * HASHES), min(least, math.ceil(LARGEST_SHARE * HASHES)))
    return min(limit, at_most(MOST_ROWS))
