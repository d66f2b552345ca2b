"""The glossary and the code know the same words."""

import re
from pathlib import Path

from consumers.decide import Outcome

ROOT = Path(__file__).parent.parent.parent
GLOSSARY = (ROOT / "docs" / "concepts.md").read_text()
CODE = "\n".join(
    path.read_text() for room in ("fedmoe", "producers", "consumers") for path in sorted((ROOT / room).rglob("*.py"))
).lower()  # fmt: skip
WORDS = [
    word.strip(" `")
    for row in re.findall(r"^\| ([^|]+) \|", GLOSSARY, flags=re.MULTILINE)
    for word in row.split(",")
    if word.strip() not in ("word", "---")
]

# Words that had a second meaning, and stand for it no more.
GONE = [
    r"\bMergeRules\b", r"\bspec\.merge\b", r"\bkeys\.(applied|head|epoch|memory)\b", r"\bnext_epoch\b",
    r"`applied\[", r":payload:\S*:head\b", r"\bTOKENIZER_PIECES\b", r"\bclass (Cut|Snapshot|Place)\b",
]  # fmt: skip


def test_every_word_of_the_glossary_is_used() -> None:
    """Else it is one that nobody needs to know."""
    assert len(WORDS) > 60
    assert [word for word in WORDS if not all(part in CODE for part in re.split(r"[ -]", word.lower()))] == []


def test_every_outcome_is_explained() -> None:
    """What becomes of an update is what users ask about first."""
    assert {outcome.value for outcome in Outcome} <= set(WORDS)


def test_words_with_two_meanings_do_not_come_back() -> None:
    """Each of them confused a reader once."""
    assert [pattern for pattern in GONE if re.search(pattern.lower(), CODE)] == []
