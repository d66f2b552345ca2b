"""fedmoe.protocol.update: a header survives its journey, and one from anybody is accepted whole or refused."""

import dataclasses
import hashlib
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedmoe.errors import UpdateError
from fedmoe.protocol.features import features_text
from fedmoe.protocol.update import (
    MAX_HEADER_BYTES,
    MAX_PARTS,
    PART_BYTES,
    ForeignHeaderError,
    Header,
    Part,
    UpdateId,
    is_run,
    make_run,
)
from tests.errors import raises
from tests.strategies import flip_bytes, headers, oddities, seeds

PLAIN = Header(
    lineage="lineage",
    spec="0123456789abcdef",
    run="1-0123abcd",
    seq=3,
    prev=UpdateId("1-0123abcd", 2),
    base_version=7,
    wire_format="fp32",
    base_fingerprint="fingerprint",
    n_examples=4,
    n_tokens=512,
    steps=2,
    loss=1.5,
    position="[0, 4]",
    parts=(Part.of(b"payload"),),
)
FIELDS = [field.name for field in dataclasses.fields(Header)]
VALIDATION = {name for name in FIELDS if name.startswith("val_")}


def changed(**changes: Any) -> bytes:
    return bytes(msgpack.packb(msgpack.unpackb(PLAIN.pack()) | changes))


def reason(data: bytes) -> str:
    """What the refusal of this header is about; empty if unpack does not refuse it."""
    caught = None
    try:
        header = Header.unpack(data)
    except UpdateError as error:
        caught = error
    if caught:
        assert len(str(caught)) < 300
        return caught.about
    assert Header.unpack(header.pack()).id == header.id
    assert {type(getattr(header, name)) for name in ("seq", "base_version", "steps")} == {int}
    return ""


@given(headers())
def test_a_header_survives_packing(header: Header) -> None:
    """unpack(pack(h)) == h, and packing is deterministic."""
    assert Header.unpack(header.pack()) == header
    assert Header.unpack(header.pack()).pack() == header.pack()


def test_a_header_of_the_most_parts_fits() -> None:
    """The largest adapter there can be still has a header within the bound."""
    header = dataclasses.replace(PLAIN, parts=(Part(PART_BYTES, b"\xff" * 32),) * MAX_PARTS)
    assert len(header.pack()) < MAX_HEADER_BYTES
    assert Header.unpack(header.pack()).payload_bytes == MAX_PARTS * PART_BYTES


@given(st.binary(min_size=1, max_size=300), st.booleans(), seeds)
def test_a_part_is_told_from_a_damaged_one(data: bytes, quick: bool, seed: int) -> None:
    """By the digest of this release, and by that of earlier ones."""
    part = Part.of(data, quick=quick)
    assert len(part.digest) == (16 if quick else 32)
    assert part.matches(data)
    damaged = flip_bytes(data, seed, 1)
    assert part.matches(damaged) is (damaged == data)


def test_a_header_for_earlier_aggregators() -> None:
    """They read digests by SHA-256 only; what the header says of its parts is the same otherwise."""
    parts = [b"one", b"another"]
    header = dataclasses.replace(PLAIN, parts=tuple(map(Part.of, parts)), requires="quick_digests")
    assert header.known_by(features_text(), parts) is header
    earlier = header.known_by("hold tail", parts)
    assert earlier.requires == ""
    assert [part.digest for part in earlier.parts] == [hashlib.sha256(part).digest() for part in parts]
    assert dataclasses.replace(earlier, parts=header.parts, requires=header.requires) == header
    signed = dataclasses.replace(header, requires="quick_digests signing")
    assert signed.known_by("", parts).requires == "signing"
    assert earlier.known_by("", parts) is earlier


@given(st.binary(max_size=300) | oddities().map(msgpack.packb))
@example(b"")
@example(b"\x91" * 5000)
def test_garbage_is_an_update_error(data: bytes) -> None:
    """Bytes of any kind raise UpdateError and nothing else."""
    assert reason(data)


@given(st.sampled_from([*FIELDS, "header_format", "another"]), oddities())
def test_an_odd_field_is_refused_or_of_the_right_type(field: str, value: object) -> None:
    """Whatever stands in a field: what unpack returns packs again, else it is an UpdateError."""
    reason(changed(**{field: value}))


@given(headers(), seeds, st.integers(1, 8))
def test_a_damaged_header_never_raises_anything_else(header: Header, seed: int, flips: int) -> None:
    """Flipped, missing and added bytes give another header or an UpdateError."""
    reason(flip_bytes(header.pack(), seed, flips))


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"header_format": 2}, "header_format"),
        ({"header_format": 0, "new field": 0}, "header_format"),
        ({"header_format": "2"}, "header_format"),
        ({"seq": 0}, "run"),
        ({"seq": True}, "seq"),
        ({"seq": 2**53 + 1}, "seq"),
        ({"base_version": -1}, "base_version"),
        ({"base_version": 1.0}, "base_version"),
        ({"run": "1-0123ABCD"}, "run"),
        ({"run": "١-0123abcd"}, "run"),
        ({"run": "1-0123abcd\n"}, "run"),
        ({"loss": 1}, "loss"),
        ({"position": "x" * 1025}, "position"),
        ({"lineage": b"lineage"}, "lineage"),
        ({"prev": ["1-0123abcd", 0]}, "prev"),
        ({"prev": ["1-0123abcd", True]}, "prev"),
        ({"prev": ["1-0123abcd"]}, "prev"),
        ({"prev": "ab"}, "prev"),
        ({"parts": ""}, "parts"),
        ({"parts": {}}, "parts"),
        ({"parts": [[1, b"short"]]}, "part"),
        ({"parts": [[True, bytes(32)]]}, "part"),
        ({"parts": [[0, bytes(32)]]}, "length"),
        ({"parts": [[2**40, bytes(32)]]}, "length"),
        ({"vector": "text"}, "vector"),
        ({"vector": b"", "vector_rows": -1}, "vector_rows"),
        ({"parts": [[1, bytes(32)]] * (MAX_PARTS + 1)}, "msgpack"),
    ],
)
def test_the_refusal_is_about_the_field(changes: dict[str, Any], about: str) -> None:
    """Each rule of the header has a refusal that names what is wrong."""
    assert Header.unpack(changed()) == PLAIN
    assert reason(changed(**changes)) == about


@pytest.mark.parametrize(("form", "who"), [(2, "the aggregator"), (0, "the worker")])
def test_a_header_of_another_format_says_whose_fedmoe_to_upgrade(form: int, who: str) -> None:
    """The later one's is right; a header of no format at all is no reason to upgrade."""
    with pytest.raises(ForeignHeaderError, match=f"has format {form}, .* format 1: upgrade {who}'s FedMoE$"):
        Header.unpack(changed(header_format=form))
    with raises(UpdateError, about="header_format") as caught:
        Header.unpack(changed(header_format="2"))
    assert not isinstance(caught.value, ForeignHeaderError)


def test_a_header_of_before_is_read() -> None:
    """An earlier FedMoE, or its checkpoint, does not name the tokenizer."""
    content = msgpack.unpackb(PLAIN.pack())
    del content["tokenizer"]
    assert Header.unpack(msgpack.packb(content)) == PLAIN


OPTIONAL = {"tokenizer", "requires", "vector", "vector_rows", "unknown", *VALIDATION}


@pytest.mark.parametrize("missing", sorted(set(FIELDS) - OPTIONAL))
def test_every_field_is_needed(missing: str) -> None:
    """A header without one of its fields is refused, by its name."""
    content = msgpack.unpackb(PLAIN.pack())
    del content[missing]
    assert reason(msgpack.packb(content)) == missing


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd\x00\x03\xff\xff" * 1000,
        b"\xdd\x00\x03\xff\xf0" + b"\x80" * 0x3FFF0,
        b"\xc6\xff\xff\xff\xff",
        b"\0" * (MAX_HEADER_BYTES + 1),
    ],
)
def test_absurd_sizes_are_refused_before_they_are_allocated(bomb: bytes) -> None:
    """A header that claims gigabytes costs no more than a few times its own length."""
    tracemalloc.start()
    try:
        assert reason(bomb) == ("length" if len(bomb) > MAX_HEADER_BYTES else "msgpack")
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_HEADER_BYTES
    finally:
        tracemalloc.stop()


@given(st.integers(0, 10**12 - 1))
def test_a_run_tells_its_incarnation(incarnation: int) -> None:
    """The incarnation that a run was made of can be read from its name; anything else has incarnation 0."""
    run = make_run(incarnation, "00ff00ff")
    assert is_run(run)
    assert UpdateId(run, 1).incarnation == incarnation
    assert str(UpdateId(run, 1)) == f"{run}:1"
    assert UpdateId("no run", 1).incarnation == 0


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_a_part_matches_only_its_own_bytes(data: bytes, other: bytes) -> None:
    """Length and digest recognise the part, and nothing else."""
    assert Part.of(data).matches(data)
    assert Part.of(data).matches(other) == (data == other)


@pytest.mark.parametrize("missing", [(), ("tokenizer", "requires")])
def test_header_that_is_accepted_can_be_written_and_read_again(missing: tuple[str, ...]) -> None:
    """With as many fields, or as large, as can be: it is kept, and announced again."""
    content = {key: value for key, value in msgpack.unpackb(PLAIN.pack()).items() if key not in missing}
    fitting = 0
    for extra in range(70):
        many = msgpack.packb(content | {f"x{n}": 0 for n in range(extra)})
        large = msgpack.packb(content | {"x": "y" * (MAX_HEADER_BYTES - 60 * extra)})
        for data in (many, large):
            try:
                header = Header.unpack(data)
            except UpdateError:
                continue
            fitting += 1
            assert Header.unpack(header.pack()) == header
    assert fitting > 70
