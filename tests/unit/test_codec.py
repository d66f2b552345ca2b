"""fedmoe.codec: what an update loses on the wire, and that garbage of any kind is refused by one error."""

import re
import tracemalloc
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fedmoe.codec import BLOCK, FORMATS, decode, encode, part_count
from fedmoe.errors import UpdateError
from fedmoe.update import PART_BYTES
from tests.strategies import flats, flip_bytes, oddities, randn, seeds, wire_formats

SMALL = 200  # values: three whole blocks and a rest
small_flats = flats(st.integers(1, SMALL))


def round_trip(flat: torch.Tensor, wire_format: str) -> torch.Tensor:
    out = torch.full_like(flat, torch.nan)
    decode(encode(flat, wire_format), wire_format, out)
    return out


def frame(**changes: Any) -> bytes:
    """The only part of an int8 update of SMALL values, with some fields changed."""
    (part,) = encode(randn(0, SMALL), "int8")
    return bytes(msgpack.packb(msgpack.unpackb(part) | changes))


def reason(*parts: bytes, wire_format: str = "int8") -> str:
    """Why decode refuses these parts of an update of SMALL values; empty if it does not."""
    try:
        decode(parts, wire_format, torch.empty(SMALL))
    except UpdateError as error:
        return str(error)
    return ""


def refuse(*parts: bytes, match: str, wire_format: str = "int8") -> None:
    text = reason(*parts, wire_format=wire_format)
    assert re.search(match, text)
    assert len(text) < 300


@given(small_flats)
def test_fp32_loses_nothing(flat: torch.Tensor) -> None:
    """Bit for bit the same."""
    assert torch.equal(round_trip(flat, "fp32"), flat)


@given(small_flats)
def test_bf16_keeps_eight_bits(flat: torch.Tensor) -> None:
    """The relative error of a value is at most 2^-8."""
    assert ((round_trip(flat, "bf16") - flat).abs() <= flat.abs() * 2.0**-8).all()


@given(flats(st.integers(1, SMALL), exponents=(-40, 30)))
@example(torch.tensor([3.4e38, 1.0]))
@example(torch.tensor([1.0] * BLOCK + [1e-3]))
def test_int8_errs_by_half_a_step(flat: torch.Tensor) -> None:
    """The error of a value is at most 1/254 of the largest of its block of 64."""
    error = (round_trip(flat, "int8") - flat).abs()
    for first in range(0, len(flat), BLOCK):
        block = slice(first, first + BLOCK)
        # 1e-36: a scale below the smallest normal number has no full precision.
        assert error[block].max() <= flat[block].abs().max() / 254 * (1 + 1e-5) + 1e-36


@given(small_flats, wire_formats)
def test_encoding_is_deterministic_and_idempotent(flat: torch.Tensor, wire_format: str) -> None:
    """What was decoded travels again without further loss, so `pending` is what the aggregator folds."""
    decoded = round_trip(flat, wire_format)
    assert torch.allclose(round_trip(decoded, wire_format), decoded, rtol=1e-6, atol=1e-36)
    assert list(encode(flat, wire_format)) == list(encode(flat.clone(), wire_format))


@pytest.mark.parametrize("wire_format", sorted(FORMATS))
@pytest.mark.parametrize("extra", [-1, 0, 1, BLOCK])
def test_parts_are_full_and_at_most_a_mebibyte(wire_format: str, extra: int) -> None:
    """Cut at the part border, one below and one above: every value arrives, no part is too long."""
    form = FORMATS[wire_format]
    flat = randn(1, 2 * form.values_per_part + extra)
    parts = list(encode(flat, wire_format))
    assert len(parts) == part_count(wire_format, len(flat)) == (2 if extra <= 0 else 3)
    assert max(map(len, parts)) <= PART_BYTES
    assert len(parts[0]) > PART_BYTES * 0.99
    out = torch.full_like(flat, torch.nan)
    decode(parts, wire_format, out)
    assert (out - flat).abs().max() < flat.abs().max() / 200


@pytest.mark.parametrize("wire_format", sorted(FORMATS))
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, SMALL - 1])
def test_non_finite_values_arrive_non_finite(wire_format: str, poison: float, place: int) -> None:
    """The aggregator finds them by the norm of what it decoded; the codec must not hide them."""
    flat = torch.ones(SMALL)
    flat[place] = poison
    assert not round_trip(flat, wire_format).norm().isfinite()


@given(st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.integers(0, 3), seeds)
def test_non_finite_scales_arrive_non_finite(poison: float, block: int, seed: int) -> None:
    """A forged scale of NaN or infinity shows in the norm, even over codes that are zero."""
    scales = torch.ones(4)
    scales[block] = poison
    codes = (randn(seed, SMALL) > 1).to(torch.int8)
    part = frame(scales=scales.numpy().tobytes(), data=codes.numpy().tobytes())
    out = torch.empty(SMALL)
    decode([part], "int8", out)
    assert not out.norm().isfinite()


@given(st.lists(st.binary(max_size=300) | oddities().map(msgpack.packb), max_size=3), wire_formats)
@example([b""], "fp32")
@example([b"\x81\xa1a" * 900 + b"\xc0"], "fp32")
def test_garbage_is_an_update_error(parts: list[bytes], wire_format: str) -> None:
    """Bytes of any kind raise UpdateError and nothing else."""
    refuse(*parts, match="part", wire_format=wire_format)


@given(st.sampled_from(["format", "first", "count", "scales", "data"]), oddities())
def test_an_odd_field_is_an_update_error(field: str, value: object) -> None:
    """Whatever stands in a field, the frame decodes to the right number of values or raises UpdateError."""
    assert len(reason(frame(**{field: value}))) < 300


@given(seeds, wire_formats, st.integers(1, 8))
def test_damaged_parts_never_raise_anything_else(seed: int, wire_format: str, flips: int) -> None:
    """Flipped, missing and added bytes give other values or an UpdateError."""
    parts = [flip_bytes(part, seed, flips) for part in encode(randn(seed, SMALL), wire_format)]
    assert len(reason(*parts, wire_format=wire_format)) < 300


def test_messages_name_the_part_and_the_field() -> None:
    """Each refusal says which part, what came and what was expected."""
    refuse(frame(format="fp32"), match="part 0 says format 'fp32', expected 'int8'")
    refuse(frame(first=64), match="part 0 says first 64, expected 0")
    refuse(frame(count=2**40), match="part 0 says count 1099511627776, expected 200")
    refuse(frame(scales=b""), match="part 0 does not hold 16 bytes of scales")
    refuse(frame(data="x" * SMALL), match="part 0 does not hold 200 bytes of data")
    refuse(frame(more=1), match="part 0 is not a msgpack frame|part 0 is not a map of")
    refuse(frame(), frame(), match="part 1 is one too many for 200 values")
    refuse(match="the parts hold 0 values, expected 200")
    refuse(b"\0" * (PART_BYTES + 1), match="part 0 has 1048577 bytes, allowed are 1048576")
    refuse(frame(first="x" * 1_000_000), match="part 0 says first 'x+\\.\\.\\.x+', expected 0")


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd\x00\x0f\xff\xff" * 1000,  # lists of a million inside each other
        b"\xdd\x00\x0f\xff\xf0" + b"\x80" * 0xFFFF0,  # a list of a million empty maps
        b"\xdf\x00\x0f\xff\xff" * 1000,
        b"\xc6\xff\xff\xff\xff" + b"\0" * 100,  # 4 GiB of bytes announced
        b"\xdb\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
    ],
)
def test_absurd_sizes_are_refused_before_they_are_allocated(bomb: bytes) -> None:
    """A part that claims gigabytes costs no more than its own length."""
    tracemalloc.start()
    try:
        refuse(bomb, match="part 0 is not")
        assert tracemalloc.get_traced_memory()[1] < 4 * PART_BYTES
    finally:
        tracemalloc.stop()
