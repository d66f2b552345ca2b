"""Rollbacks of an expert: which versions they took back, for the aggregator and for a worker."""

import json

import pytest

from consumers.kept import kept_versions
from fedmoe.errors import SpecError
from fedmoe.protocol.lines import AnchorLine, AppliedLine, RollbackLine
from fedmoe.protocol.records import Meta
from fedmoe.protocol.rollback import MOST_INTERVALS, RolledBack
from fedmoe.store.archive import Archive
from tests.errors import raises
from tests.federation import first_meta, small_spec

TWICE = RolledBack().and_also(2, 4).and_also(6, 9)


def test_versions_that_were_taken_back() -> None:
    """Neither the one that was gone back to, nor the one that the rollback made."""
    assert [version for version in range(12) if TWICE.holds(version)] == [3, 4, 7, 8, 9]
    assert [version for version in range(12) if TWICE.reason(version)] == [3, 4, 7, 8, 9]
    assert "rolled back to version 2" in TWICE.reason(4)
    assert TWICE.latest == (6, 10)
    assert (
        str(TWICE.intervals[0]) == "version 5 has the weights of version 2; versions 3 to 4 were rolled back"
    )
    assert str(RolledBack().and_also(0, 1).intervals[0]).endswith("; version 1 was rolled back")


def test_what_a_worker_knew_is_not_taken_back_from_it() -> None:
    """Its base is of after the rollbacks that it knows; one that it does not know takes back all that is above."""
    knows = RolledBack().and_also(2, 4)
    for version in (5, 6):
        assert not TWICE.takes_back(version, knows)
    for version in (7, 9, 99):  # 99: a failover lies between
        assert TWICE.takes_back(version, knows)
    assert not TWICE.takes_back(99, TWICE)
    assert TWICE.takes_back(3, RolledBack())
    assert not TWICE.takes_back(2, RolledBack())


def test_many_rollbacks_are_bounded() -> None:
    """The two oldest become one, which takes back at least as much."""
    many = RolledBack()
    for number in range(MOST_INTERVALS + 5):
        many = many.and_also(10 * number, 10 * number + 5)
    assert len(many.intervals) == MOST_INTERVALS
    assert many.intervals[0] == (0, 55)
    assert many.intervals[-1] == (10 * (MOST_INTERVALS + 4), 10 * (MOST_INTERVALS + 4) + 5)


@pytest.mark.parametrize(
    "text", ["", "x", "1", "[1]", "[[1]]", "[[1, 2, 3]]", '[["1", "2"]]', "[[1, 2.5]]", "[" * 9999]
)
def test_rollbacks_that_cannot_be_read_are_a_sentence(text: str) -> None:
    """Somebody edited meta by hand."""
    raw = {name.encode(): value.encode() for name, value in first_meta(small_spec()).to_hash().items()}
    with raises(SpecError, about="meta"):
        Meta.from_hash(raw | {b"rolled_back": text.encode()})


def test_record_is_read_as_it_was_written() -> None:
    """Also by people."""
    assert json.loads(TWICE.to_json()) == [[2, 4], [6, 9]]
    assert RolledBack.from_json(TWICE.to_json()) == TWICE


class Kept(Archive):
    """An archive that holds updates and weights by their digests."""

    def __init__(self, *digests: str) -> None:
        self._digests = digests

    def holds(self, digest: str) -> bool:
        return digest in self._digests

    holds_weights = holds

    def anchors(self) -> dict:
        return {}


def applied(version: int) -> AppliedLine:
    return AppliedLine(
        version=version, worker="w", run="1-0123abcd", seq=version, base_version=0, staleness=0, factor=1.0, norm=1.0,
        loss=1.0, n_examples=1, rules=1, update=f"u{version}",
    )  # fmt: skip


def back(version: int, to: int) -> RollbackLine:
    return RollbackLine(version=version, rolled_back_to=to, by="me", weights=f"w{version}")


@pytest.mark.parametrize(
    ("history", "digests", "kept"),
    [
        ([], "", [(0, 0)]),
        ([1, 2, 3], "u1 u2 u3", [(0, 3)]),
        ([1, 2, 3], "u1 u3", [(0, 1)]),
        ([2, 3], "u2 u3", [(0, 0)]),  # a line is gone
        ([1, 2, back(3, 1), 4], "u1 u2 u4", [(0, 4)]),
        ([1, 2, back(3, 1), 4], "u2 u4", [(0, 0)]),
        ([1, 2, back(3, 1), 4], "u2 u4 w3", [(0, 0), (3, 4)]),
        ([1, AnchorLine(version=5, restored="lost", weights="a"), 6], "u1 u6 a", [(0, 1), (5, 6)]),
        ([1, AnchorLine(version=5, restored="lost"), 6], "u1 u6", [(0, 1)]),
        ([AnchorLine(version=5, restored="lost", weights="a"), 6, back(7, 3)], "u6 a", [(0, 0), (5, 6)]),
        ([AnchorLine(version=5, restored="lost", weights="a"), 6, back(7, 5)], "u6 a", [(0, 0), (5, 7)]),
    ],
)  # fmt: skip
def test_versions_that_can_be_recomputed(history: list, digests: str, kept: list) -> None:
    """From the log and what is kept."""
    lines = [applied(line) if isinstance(line, int) else line for line in history]
    assert kept_versions(lines, Kept(*digests.split()), lineage="l", upto=99) == kept
