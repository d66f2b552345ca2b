"""A row of the demo's corpus, and the split of rows into training, validation and test by their source."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

TEST_SHARE = 0.2  # of the sources, not of the rows
VALID_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One example; `source` names its file, topic or database."""

    prompt: str
    completion: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Rows for training, for choosing settings and for the final measurement; each source is in one of them only."""

    train: tuple[Row, ...]
    valid: tuple[Row, ...]
    test: tuple[Row, ...]


def split_by_source(rows: Iterable[Row], *, seed: int, train: int, valid: int, test: int) -> Split:
    """Split the sources, then take at most `train`, `valid` and `test` rows, spread evenly over the sources.

    A completion that several sources have (copied helpers, text in two topics) belongs to the first source only. A row
    is not held out if its completion is anywhere in the training rows.
    """
    by_source: dict[str, list[Row]] = defaultdict(list)
    for row in {row.completion: row for row in reversed(list(rows))}.values():
        by_source[row.source].append(row)
    sources = sorted(by_source, key=lambda source: _order(seed, source))
    n_test, n_valid = round(len(sources) * TEST_SHARE), round(len(sources) * VALID_SHARE)
    learned = _pick(by_source, sources[n_test + n_valid :], train, seed)
    text = "\n".join(part for row in learned for part in (row.prompt, row.completion))
    unseen = {source: [r for r in by_source[source] if r.completion not in text] for source in sources}
    return Split(
        train=learned,
        valid=_pick(unseen, sources[n_test : n_test + n_valid], valid, seed),
        test=_pick(unseen, sources[:n_test], test, seed),
    )


def _pick(by_source: dict[str, list[Row]], sources: list[str], count: int, seed: int) -> tuple[Row, ...]:
    """Take one row of each source, then a second of each, and so on up to `count`; shuffled."""
    ranked = []
    for source in sources:
        rows = sorted(by_source[source], key=lambda row: _order(seed, row.prompt + row.completion))
        ranked += [(rank, _order(seed, source), row) for rank, row in enumerate(rows)]
    ranked.sort(key=lambda entry: entry[:2])
    chosen = [row for _, _, row in ranked[:count]]
    return tuple(sorted(chosen, key=lambda row: _order(seed, row.prompt + row.completion)))


def _order(seed: int, text: str) -> bytes:
    # A digest gives the same order on every Python version; `random` does not promise that.
    return hashlib.sha256(f"{seed}/{text}".encode()).digest()
