"""Stores many examples in little memory."""

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from fedmoe.data.encode import Answer, Example

TYPES = {
    "ids": "i",
    "ends": "q",
    "starts": "i",
    "stops": "i",
    "weights": "d",
    "answer_ends": "q",
    "lines": "q",
    "rows": "q",
    "sources": "q",
}
WHERE_FROM = ("lines", "rows", "sources")  # not what is trained on


class FlatExamples(Sequence[Example]):
    """Examples in flat arrays: 4 bytes per token and about 60 per example, where objects take some 500.

    The arrays: `ids` int32, the tokens of all examples; `ends` int64, the end of each example in `ids`; `starts` and
    `stops` int32 and `weights` float64 of all answers; `answer_ends` int64, the end of each example in these three;
    `lines`, `rows` and `sources` int64, the line of each example in the file and the hashes of its row and source.
    """

    def __init__(self, arrays: Mapping[str, "array[Any]"] | None = None) -> None:
        self.arrays: dict[str, array[Any]] = (
            dict(arrays) if arrays is not None else {name: array(t) for name, t in TYPES.items()}
        )

    def extend(self, examples: Iterable[Example]) -> None:
        """Append examples."""
        arrays = self.arrays
        for example in examples:
            arrays["ids"].extend(example.input_ids)
            arrays["ends"].append(len(arrays["ids"]))
            arrays["lines"].append(example.line)
            arrays["rows"].append(example.row)
            arrays["sources"].append(example.source)
            for answer in example.answers:
                for name, value in zip(("starts", "stops", "weights"), answer, strict=True):
                    arrays[name].append(value)
            arrays["answer_ends"].append(len(arrays["starts"]))

    def digest(self) -> str:
        """SHA-256 of all arrays except those of WHERE_FROM, as hex digits."""
        digest = hashlib.sha256()
        for name, values in self.arrays.items():
            if name in WHERE_FROM:
                continue
            digest.update(f"{name} {len(values)} ".encode())
            digest.update(values)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.arrays["ends"])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        rows = range(len(self))[index]
        if isinstance(rows, range):
            return [self[row] for row in rows]
        tokens = self._part("ends", rows)
        answers = self._part("answer_ends", rows)
        starts, stops, weights = (self.arrays[name][answers] for name in ("starts", "stops", "weights"))
        labels = tuple(map(Answer, starts, stops, weights))
        return Example(self.arrays["ids"][tokens], labels, *(self.arrays[name][rows] for name in WHERE_FROM))

    def _part(self, ends: str, row: int) -> slice:
        return slice(self.arrays[ends][row - 1] if row else 0, self.arrays[ends][row])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlatExamples) and self.arrays == other.arrays

    __hash__ = None  # type: ignore[assignment]  # it can grow
