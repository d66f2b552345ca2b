"""consumers.decide.judge_header: its truth table, and which of its checks comes first where two would speak.

A row says in what it differs from an update that is admitted: bob's second one, of base version 10, on an expert at
version 10 with 3 workers, under the rules of `RULES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import pytest

from consumers.decide import Admission, Outcome, judge_header
from fedmoe.protocol.balance import Peers
from fedmoe.protocol.formats import FORMATS, FRAME_BYTES
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.records import Decided
from fedmoe.protocol.rollback import RolledBack
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.server import ServerStep
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.staleness import Decay
from fedmoe.protocol.update import Header, Part, UpdateId
from tests.federation import FINGERPRINT, LAYOUT, aggregating, first_meta, small_spec

WORKERS, VERSION, BOUND = 3, 10, 4
SPEC = small_spec()
RULES = aggregating(lr=0.5, decay=Decay(a=2.0), max_norm=7.0, max_staleness=BOUND)
META = first_meta(
    SPEC, version=VERSION, rules=RULES, base_model="base", base_fingerprint_by="worker zoe",
    tokenizer="template:00 added:1a", tokenizer_by="worker zoe",
)  # fmt: skip
FIRST, SECOND = UpdateId("1-00000001", 1), UpdateId("1-00000001", 2)
LARGEST = 4 * LAYOUT.numel + FRAME_BYTES  # bytes of a part: all values in fp32, and the frame
FULL_PART = FORMATS["fp32"].part_bytes + FRAME_BYTES
LARGE = small_spec(layout=Layout.of([("a", (FORMATS["fp32"].values_per_part + 1,))]))
HEADER = Header(
    lineage=META.lineage, spec=SPEC.digest, run=SECOND.run, seq=SECOND.seq, prev=FIRST, base_version=VERSION,
    wire_format="fp32", base_fingerprint=FINGERPRINT, n_examples=4, n_tokens=40, steps=2, loss=0.5, position="8",
    parts=(Part(LARGEST, bytes(32)),), tokenizer="template:00 added:1a",
)  # fmt: skip


def parts(*lengths: int) -> dict[str, Any]:
    return {"parts": tuple(Part(length, bytes(32)) for length in lengths)}


def decided(update: UpdateId) -> Decided:
    return Decided(id=update, how="applied", version=VERSION)


# How each reason begins: its one mention in this file.
LINEAGE, PREV, NOTHING = "trained on lineage", "follows update", ""
BREACHES = SPEC_, BASE, FORMAT, COUNT, SIZE, GONE, STALE, AHEAD = (
    "made for spec",
    "trained with another base model, tokenizer or chat template: ",
    "encoded as",
    "has 2 parts",
    f"has a part of {LARGEST + 1} bytes",
    "trained on version",
    "too stale",
    "it started from version",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What differs from an update that is admitted, and what is expected.

    Args:
        header, meta: fields that differ.
        head: the worker's last decided update.
        workers: that ever had an update decided; rules, spec: of the expert.
        outcome: None for an admission; reason: its beginning; staleness: of a refusal or admission.
    """

    header: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    head: UpdateId | None = FIRST
    workers: int = WORKERS
    rules: RuleSet = RULES
    spec: Spec = SPEC
    outcome: Outcome | None = None
    reason: str = NOTHING
    staleness: int = 0
    factor: float = 0.5

    def check(self) -> None:
        """An admission carries the factor and the norm's bound of the rules in force."""
        judged = judge_header(
            replace(HEADER, **self.header),
            self.head and decided(self.head),
            replace(META, **({"rules": self.rules} | dict(self.meta))),
            self.spec,
            Peers(self.workers),
        )
        if isinstance(judged, Admission):
            expected = Admission(self.staleness, ServerStep(self.rules.aggregation, self.factor))
            assert (self.outcome, judged) == (None, expected)
        else:
            assert (judged.outcome, judged.staleness) == (self.outcome, self.staleness)
            assert judged.reason.startswith(self.reason)
            assert bool(judged.reason) == bool(self.reason)


def undecidable(reason: str, **differs: Any) -> Row:
    return Row(outcome=Outcome.UNDECIDABLE, reason=reason, **differs)


def refused(reason: str, **differs: Any) -> Row:
    return Row(outcome=Outcome.REFUSED, reason=reason, **differs)


OTHER = "f" * 16
STEPS_BACK = {"base_version": VERSION - BOUND - 1}
STEPS_AHEAD = {"base_version": VERSION + BOUND + 1}
BACK = RolledBack().and_also(5, 6).and_also(8, 9)
AUTO = aggregating(lr=0.5, decay=Decay(kind="constant"))
TABLE = {
    # admitted
    "as it should be": Row(),
    "the first of its worker": Row(header={"prev": None}, head=None),
    "the first of a new run": Row(header={"run": "2-00000002", "seq": 1}),
    "stale, at the bound": Row(
        header={"base_version": VERSION - BOUND}, staleness=BOUND, factor=0.5 * (1 + BOUND) ** -2
    ),
    "based on the version that was gone back to": Row(
        header={"base_version": 8}, meta={"rolled_back": BACK}, staleness=2, factor=0.5 / 9
    ),
    "based on the rollback": Row(meta={"rolled_back": BACK}),
    "stale by one": Row(header={"base_version": VERSION - 1}, staleness=1, factor=0.5 / 4),
    "ahead, at the bound": Row(header={"base_version": VERSION + BOUND}),
    "nobody pinned a base model": Row(meta={"base_fingerprint": ""}, header={"base_fingerprint": OTHER}),
    "nobody pinned a tokenizer": Row(meta={"tokenizer": ""}, header={"tokenizer": "template:ff"}),
    "its tokenizer is not known": Row(header={"tokenizer": ""}),
    "a component that nobody pinned": Row(header={"tokenizer": "template:00 added:1a vocabulary:02"}),
    "a part of the largest size": Row(header=parts(LARGEST)),
    "a part of the smallest size": Row(header=parts(1)),
    "two parts, where the layout gives two": Row(header=parts(FULL_PART, 300), spec=LARGE),
    "stale, at the bound of few workers": Row(
        meta={"version": 256}, header={"base_version": 0}, rules=AUTO, workers=64, staleness=256
    ),
    "stale, at the bound of many workers": Row(
        meta={"version": 260}, header={"base_version": 0}, rules=AUTO, workers=65, staleness=260
    ),
    # changes nothing
    "decided before": Row(head=SECOND, outcome=Outcome.DUPLICATE),
    "of another lineage": undecidable(LINEAGE, header={"lineage": OTHER}),
    "one before it is not decided": undecidable(PREV, head=None),
    "one after it is decided": undecidable(PREV, head=UpdateId(SECOND.run, 3)),
    "its prev has the head's seq, not its run": undecidable(PREV, head=UpdateId("2-00000002", FIRST.seq)),
    "it says that it is the first": undecidable(PREV, header={"prev": None}),
    "the same seq was decided, of another run": undecidable(PREV, head=UpdateId("2-00000002", SECOND.seq)),
    # refused
    "another spec": refused(SPEC_, header={"spec": OTHER}),
    "another base model": refused(BASE, header={"base_fingerprint": OTHER}),
    "another template": refused(BASE, header={"tokenizer": "template:ff added:1a"}),
    "another format": refused(FORMAT, header={"wire_format": "bf16"}),
    "a part too many": refused(COUNT, header=parts(100, 100)),
    "no part": refused("has 0 parts", header=parts()),
    "a part too few": refused("has 1 parts", header=parts(FULL_PART), spec=LARGE),
    "a part a byte too large": refused(SIZE, header=parts(LARGEST + 1)),
    "the second part a byte too large": refused(
        "has a part of", header=parts(300, FULL_PART + 1), spec=LARGE
    ),
    "its base was rolled back": refused(
        GONE, header={"base_version": 9}, meta={"rolled_back": BACK}, staleness=1
    ),
    "its base was rolled back some time ago": refused(
        GONE, header={"base_version": 6}, meta={"rolled_back": BACK}, staleness=4
    ),
    "its base was rolled back and is too old": refused(
        GONE, header=STEPS_BACK, meta={"rolled_back": RolledBack().and_also(4, 5)}, staleness=BOUND + 1
    ),
    "one too stale": refused(STALE, header=STEPS_BACK, staleness=BOUND + 1),
    "one too far ahead": refused(AHEAD, header=STEPS_AHEAD),
    "one too stale for few workers": refused(
        STALE, meta={"version": 257}, header={"base_version": 0}, rules=AUTO, workers=64, staleness=257
    ),
    "one too stale for many workers": refused(
        STALE, meta={"version": 261}, header={"base_version": 0}, rules=AUTO, workers=65, staleness=261
    ),
    "one too far ahead for few workers": refused(
        AHEAD, header={"base_version": VERSION + 257}, rules=AUTO, workers=64
    ),
}


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_header_is_judged_by_the_table(row: Row) -> None:
    """Every branch, and both sides of every bound."""
    row.check()


# What is checked, in this order: the first that speaks decides. Each is one row's difference.
ORDER = [
    "decided before",
    "of another lineage",
    "one before it is not decided",
    "another spec",
    "another base model",
    "another format",
    "a part too many",
    "a part a byte too large",
    "its base was rolled back and is too old",
    "one too stale",
]
PAIRS = [
    pair for pair in combinations(ORDER, 2) if pair != ("decided before", "one before it is not decided")
]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda name: name)
def test_the_earlier_check_decides(first: str, second: str) -> None:
    """Where two differ from what is admitted; that an update is decided and its predecessor not cannot be."""
    one, other = TABLE[first], TABLE[second]
    both = dict(other.header) | dict(one.header)
    if "parts" in one.header and "parts" in other.header:
        both |= parts(LARGEST + 1, LARGEST + 1)
    head = one.head if one.head != FIRST else other.head
    meta = dict(other.meta) | dict(one.meta)
    staleness = other.staleness if one.outcome is Outcome.REFUSED else one.staleness
    replace(one, header=both, meta=meta, head=head, staleness=staleness).check()


def test_the_order_names_every_check() -> None:
    """Every reason of the table but one: an update cannot be too stale and too far ahead at once."""
    assert {TABLE[name].reason for name in ORDER} == {LINEAGE, PREV, NOTHING, *BREACHES} - {AHEAD}
