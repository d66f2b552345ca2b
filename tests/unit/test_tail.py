"""fedmoe.protocol.tail, growth and exact: snapshot and tail give the exact weights, bit for bit."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.errors import ProtocolError, SpecError
from fedmoe.protocol.codec import decode, encode
from fedmoe.protocol.exact import Exact, complete, digests_of, exact_values
from fedmoe.protocol.features import COPIES, TAIL
from fedmoe.protocol.fold import Values, fold
from fedmoe.protocol.growth import MOST_WEIGHTS, Growth
from fedmoe.protocol.layout import AdapterBuffer, Layout, values_of
from fedmoe.protocol.records import PROTOCOL, Meta
from fedmoe.protocol.rules import ADAPTIVE, NESTEROV, SGD, AggregationRules
from fedmoe.protocol.server import ServerStep, first_value, has_state
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.tail import Copy, Tail, TailRecord
from tests.errors import raises

NUMEL = 300
LAYOUT = Layout.of([("a", (20, 10)), ("b", (100,))])
FORMATS = ("bf16", "int8", "int4")


def _spec(wire_format: str) -> Spec:
    return Spec(base_model="m", base_config={}, layout=LAYOUT, wire_format=wire_format)


def copied(growth: Growth, parts: Sequence[bytes], name: str = "t") -> Copy:
    """A whole copy of these parts."""
    copy = growth.copy(name, len(parts))
    assert copy is not None
    assert list(copy.reading(parts)) == parts
    copy.n_made = copy.count
    return copy


class Chain:
    """An expert as an aggregator keeps it: folded in memory, and as snapshot and tail."""

    def __init__(self, spec: Spec, seed: int) -> None:
        self.spec = spec
        self.weights, self.state = AdapterBuffer(LAYOUT), AdapterBuffer(LAYOUT)
        self.optimizer = ""
        torch.manual_seed(seed)
        self.weights.flat.copy_(torch.randn(NUMEL))
        self.meta = Meta(lineage="l", commit="c0", weights_commit="c0", spec=spec.digest, protocol=PROTOCOL)
        self.hash: dict[bytes, bytes] = {}
        self.parts: dict[str, list[bytes]] = {}  # the copies, by token
        self.snapshot()

    @property
    def state_file(self) -> bytes | None:
        return bytes(self.state.file) if self.optimizer else None

    def snapshot(self) -> None:
        """Write the weights."""
        for buffer in (self.weights, self.state):
            buffer.stamp(self.meta.weights_commit)
        self.files = bytes(self.weights.file), self.state_file
        self.hash, self.parts, self.meta = {}, {}, self.meta.with_tail(Tail())

    def apply(self, *updates: tuple[AggregationRules, float, bool]) -> bool:
        """A batch of updates; True if it is kept in the tail."""
        growth, made = Growth(self.meta, self.spec), {}
        for rules, factor, ends_round in updates:
            parts = list(encode(torch.randn(NUMEL) * 1e-2, self.spec.wire_format))
            new_state = has_state(rules) and self.optimizer != rules.server_optimizer
            if new_state:
                self.state.flat.fill_(first_value(rules))
            delta = torch.empty(NUMEL)
            decode(parts, self.spec.wire_format, delta)
            step = ServerStep(rules, factor, ends_round)
            fold(Values(self.weights.flat, self.state.flat), delta, step)
            self.optimizer = rules.server_optimizer if has_state(rules) else ""
            self.meta = replace(self.meta, version=self.meta.version + 1, server_state=self.optimizer)
            copy = copied(growth, parts, f"t{self.meta.version}") if growth.is_open else None
            growth.add(self.meta.version, step, copy, rules=1, new_state=new_state)
            made[f"t{self.meta.version}"] = parts
        commit = f"c{self.meta.version}"
        self.meta = replace(
            self.meta, weights_commit=commit, digests=digests_of(commit, self.weights.file, self.state_file)
        )
        if growth.is_open:
            self.hash |= {k.encode(): v.encode() for k, v in growth.fields.items()}
            self.parts |= made
            self.meta = self.meta.with_tail(growth.tail)
        else:
            self.snapshot()
        return growth.is_open

    def read(self, **other: Any) -> Exact:
        """What a reader of Redis gets."""
        weights, state = self.files
        meta = Meta.from_hash({k.encode(): v.encode() for k, v in self.meta.to_hash().items()})
        given = {"weights": weights, "server_state": state, "tail": self.hash, "copies": self.copies} | other
        return exact_values(meta, self.spec, **given)

    def copies(self, token: str, count: int) -> Iterator[bytes | None]:
        """The parts of a copy."""
        found = self.parts.get(token, [])
        return (found[index] if index < len(found) else None for index in range(count))

    def check(self) -> None:
        """A reader gets what the memory holds."""
        found = self.read()
        assert torch.equal(values_of(LAYOUT, found.weights), self.weights.flat)
        self.weights.stamp(self.meta.weights_commit)
        assert found.weights == bytes(self.weights.file)
        self.state.stamp(self.meta.weights_commit)
        assert found.server_state == self.state_file


RULES = st.builds(
    AggregationRules,
    server_optimizer=st.sampled_from([SGD, NESTEROV, ADAPTIVE]),
    server_momentum=st.floats(0, 0.9),
    server_beta2=st.floats(0, 0.99),
    server_epsilon=st.floats(1e-4, 1),
)
UPDATES = st.lists(st.tuples(RULES, st.floats(0.001, 2), st.booleans()), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(
    updates=UPDATES, wire_format=st.sampled_from(FORMATS), seed=st.integers(0, 99),
    cuts=st.sets(st.integers(0, 12)), snapshots=st.sets(st.integers(0, 12)),
)  # fmt: skip
def test_any_split_gives_the_same_bits(
    updates: list[tuple[AggregationRules, float, bool]], wire_format: str, seed: int,
    cuts: set[int], snapshots: set[int],
) -> None:  # fmt: skip
    """However updates come in batches, and whenever the weights are written, under whatever rules."""
    chain = Chain(_spec(wire_format), seed)
    edges = sorted({0, len(updates)} | {cut for cut in cuts if cut < len(updates)})
    for first, after in pairwise(edges):
        chain.apply(*updates[first:after])
        chain.check()
        if after in snapshots:
            chain.snapshot()
            chain.check()


PLAIN = (AggregationRules(), 0.5, False)


def _with_tail(n: int = 2) -> Chain:
    chain = Chain(_spec("int4"), 0)
    for _ in range(n):
        assert chain.apply(PLAIN)
    return chain


def test_the_weights_are_written_once_the_tail_outweighs_them() -> None:
    """And not before; in format fp32 always."""
    chain = Chain(_spec("bf16"), 0)
    most, seen = MOST_WEIGHTS * LAYOUT.file_bytes, 0
    while chain.apply(PLAIN):
        assert seen < chain.meta.tail.n_bytes <= most
        seen = chain.meta.tail.n_bytes
        assert chain.meta.requires.split() == [COPIES, TAIL]
    assert seen + sum(map(len, encode(torch.randn(NUMEL), "bf16"))) + 150 > most
    assert not chain.meta.tail
    assert chain.meta.requires == ""
    assert not Chain(_spec("fp32"), 0).apply(PLAIN)


def test_a_batch_that_outweighs_the_weights_is_not_kept() -> None:
    """Then it is cheaper to write the weights, and the parts take no memory."""
    chain = Chain(_spec("bf16"), 0)
    growth = Growth(chain.meta, chain.spec)
    part = b"x" * 500
    for version in range(1, 9):
        copy = copied(growth, [part]) if growth.is_open else None
        growth.add(version, ServerStep(*PLAIN), copy, rules=1, new_state=False)
    assert not growth.is_open
    assert (growth.fields, growth.kept) == ({}, [])
    assert 0 < len(growth.made) < 8


def test_an_update_that_was_not_copied_is_not_kept() -> None:
    """The weights are written, and what was copied before it is not needed."""
    chain = Chain(_spec("int4"), 0)
    growth = Growth(chain.meta, chain.spec)
    growth.add(1, ServerStep(*PLAIN), copied(growth, [b"x"]), rules=1, new_state=False)
    assert (growth.is_open, growth.kept) == (True, growth.made)
    growth.add(2, ServerStep(*PLAIN), growth.copy("half", 2), rules=1, new_state=False)
    assert (growth.is_open, growth.kept, len(growth.made)) == (False, [], 2)
    assert growth.copy("more", 1) is None


def test_redis_without_room_has_no_tail() -> None:
    """An aggregator may ask for the weights in any case."""
    chain = Chain(_spec("int4"), 0)
    assert not Growth(chain.meta, chain.spec, is_wanted=False).is_open


@pytest.mark.parametrize("version", [1, 2])
def test_what_is_missing_is_named(version: int) -> None:
    """In one sentence."""
    chain = _with_tail()
    parts = chain.parts.pop(f"t{version}")
    with raises(SpecError, about="tail") as caught:
        chain.read()
    assert f"lacks part 0 of the update of version {version} (copy t{version})" in str(caught.value)
    chain.parts[f"t{version}"] = parts
    del chain.hash[b"%d" % version]
    with raises(SpecError, about="tail") as caught:
        chain.read()
    assert f"lacks the field {version}" in str(caught.value)


def test_records_of_several_histories_are_told_apart() -> None:
    """A record, or a whole tail, of another history is not folded."""
    chain, other = _with_tail(), Chain(_spec("int4"), 1)
    other.apply((AggregationRules(), 0.25, False))
    other.apply(PLAIN)
    with raises(SpecError, about="tail"):
        chain.read(tail=other.hash)
    with raises(SpecError, about="tail"):
        chain.read(tail=chain.hash | {b"2": other.hash[b"2"]})
    with raises(SpecError, about="tail") as caught:
        chain.read(copies=lambda token, count: chain.copies("t1", count))
    assert "the update of version 2 is damaged" in str(caught.value)


def test_other_weights_under_the_tail_are_found_by_the_digest() -> None:
    """Also if somebody forged the stamp; and without a tail."""
    chain = _with_tail()
    other = AdapterBuffer(LAYOUT)
    other.stamp(chain.meta.tail.snapshot)
    with raises(SpecError, about="weights_digest"):
        chain.read(weights=bytes(other.file))
    chain.snapshot()
    other.stamp(chain.meta.weights_commit)
    with raises(SpecError, about="weights_digest"):
        chain.read(weights=bytes(other.file))


def test_a_server_state_that_the_tail_goes_on_from_must_be_there() -> None:
    """Without a tail it may be missing: the optimizer starts from zero."""
    nesterov = (AggregationRules(server_optimizer=NESTEROV), 0.5, True)
    chain = Chain(_spec("int4"), 0)
    chain.apply(nesterov)
    chain.check()
    chain.snapshot()
    assert chain.read(server_state=None).problem == "its server state is missing"
    chain.apply(nesterov)
    with raises(SpecError, about="server_state"):
        chain.read(server_state=None)
    chain.apply(PLAIN)
    with raises(SpecError, about="server_state"):
        chain.read(server_state=None)


def test_the_digests_of_an_earlier_release_do_not_count() -> None:
    """An aggregator of a release that knows no digests commits, and leaves the field as it was."""
    chain = _with_tail()
    chain.snapshot()
    chain.weights.flat.add_(1)
    chain.meta = replace(chain.meta, weights_commit="old")
    chain.snapshot()
    chain.check()


def test_a_record_of_a_later_release_that_requires_more() -> None:
    """A reader that does not know it does not fold."""
    chain = _with_tail(1)
    record = replace(TailRecord.from_json(chain.hash[b"1"]), requires="more")
    with raises(ProtocolError, about="requires"):
        chain.read(tail=chain.hash | {b"1": record.to_json().encode()})


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b'{"version": "x"}'])
def test_malformed_records(text: bytes) -> None:
    """Are said, and no traceback."""
    with raises(SpecError, about="tail"):
        TailRecord.from_json(text)


def test_a_malformed_tail_in_meta() -> None:
    """Meta is then malformed."""
    chain = _with_tail(1)
    for text in ("{", "[1]", '{"snapshot": 1}', '{"fields": "x", "snapshot": "c"}'):
        raw = {k.encode(): v.encode() for k, v in chain.meta.to_hash().items()} | {b"tail": text.encode()}
        with raises(SpecError, about="meta"):
            Meta.from_hash(raw)


def test_complete_says_what_is_damaged() -> None:
    """As `DamagedExpertError` shows it."""
    chain = _with_tail()
    meta = {k.encode(): v.encode() for k, v in chain.meta.to_hash().items()}
    spec = chain.spec.to_json().encode()
    given: dict[str, Any] = {"weights": chain.files[0], "server_state": None}
    condition, exact = complete(spec, meta, {}, **given, tail=chain.hash, copies=chain.copies)
    assert not condition.damage
    assert exact is not None
    condition, exact = complete(spec, meta, {}, **given, tail=None)
    assert exact is None
    assert "lacks the field 1" in condition.damage


def test_what_a_later_release_adds_is_left_alone() -> None:
    """In records, which their digests cover as they are stored, and in meta."""
    copy = copied(Growth(Chain(_spec("int4"), 0).meta, _spec("int4")), [b"x"])
    record = TailRecord.of(
        4, ServerStep(AggregationRules(server_optimizer=NESTEROV, server_momentum=0.1), 0.1 + 0.2, True), copy,
        rules=2, prev="c", new_state=True,
    )  # fmt: skip
    text = json.dumps(json.loads(record.to_json()) | {"added_later": "x"})
    assert TailRecord.from_json(text.encode()) == record
    tail = Tail(snapshot="c", snapshot_version=3, head="d", fields=4, n_bytes=5)
    assert Tail.from_json(json.dumps(json.loads(tail.to_json()) | {"added_later": 1})) == tail
