"""fedmoe.protocol.codec: what an update loses on the wire, and that garbage of any kind is refused by one error."""

import json
import re
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import msgpack
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from consumers.decide import Outcome
from consumers.payload import Workspace, fold_payload
from fedmoe.errors import UpdateError
from fedmoe.protocol import formats
from fedmoe.protocol.codec import decode, encode, encode_to, part_count, part_lengths
from fedmoe.protocol.fold import Values
from fedmoe.protocol.formats import BLOCK, FORMATS, MAX_VALUES_PER_PART
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.records import Decided
from fedmoe.protocol.update import PART_BYTES, make_run
from fedmoe.util.threads import Threads
from producers.ledger import Ledger, Trained
from tests.federation import admission, delta_of, first_meta, small_spec
from tests.strategies import flats, flip_bytes, oddities, randn, seeds, wire_formats

SMALL = 200  # values: three whole blocks and a rest
CODED = {"int8": 127, "int4": 7}  # formats that write steps, and the most steps a value has
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "parts.json").read_text())
small_flats = flats(st.integers(1, SMALL))
coded = st.sampled_from(sorted(CODED))


def floats(text: str) -> torch.Tensor:
    """fp32 values that were written as hex digits."""
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.float32)


def bits(values: torch.Tensor) -> list[int]:
    """What tells 0 from -0."""
    return values.view(torch.int32).tolist()


def round_trip(flat: torch.Tensor, wire_format: str) -> torch.Tensor:
    out = torch.full_like(flat, torch.nan)
    decode(encode(flat, wire_format), wire_format, out)
    return out


def frame(wire_format: str = "int8", /, **changes: Any) -> bytes:
    """The only part of an update of SMALL values, with some fields changed."""
    (part,) = encode(randn(0, SMALL), wire_format)
    return bytes(msgpack.packb(msgpack.unpackb(part) | changes))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


def refused(*parts: bytes, wire_format: str = "int8") -> UpdateError | None:
    """Why decode refuses these parts of an update of SMALL values; None if it does not."""
    caught = None
    try:
        decode(parts, wire_format, torch.empty(SMALL))
    except UpdateError as error:
        caught = error
    assert len(str(caught)) < 300
    return caught


def reason(*parts: bytes, wire_format: str = "int8") -> str:
    """What the refusal of these parts is about; empty if they are none."""
    error = refused(*parts, wire_format=wire_format)
    return error.about if error else ""


@given(small_flats)
def test_fp32_loses_nothing(flat: torch.Tensor) -> None:
    """Bit for bit the same."""
    assert torch.equal(round_trip(flat, "fp32"), flat)


@given(small_flats)
def test_bf16_keeps_eight_bits(flat: torch.Tensor) -> None:
    """The relative error of a value is at most 2^-8."""
    assert ((round_trip(flat, "bf16") - flat).abs() <= flat.abs() * 2.0**-8).all()


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['format']}-{len(row['values']) // 8}")
def test_golden_parts(row: dict[str, str]) -> None:
    """Bytes that were written from the description of the formats, without this code: what is sent, what is read."""
    values = floats(row["values"])
    assert [part.hex() for part in encode(values, row["format"])] == [row["part"]]
    out = torch.full_like(values, torch.nan)
    decode([bytes.fromhex(row["part"])], row["format"], out)
    assert torch.equal(out, floats(row["decoded"]))


@given(flats(st.integers(1, SMALL), exponents=(-40, 30)), coded)
@example(torch.tensor([3.4e38, 1.0]), "int8")
@example(torch.tensor([3.4e38, 1.0]), "int4")
@example(torch.tensor([1.0] * BLOCK + [1e-3]), "int8")
@example(torch.tensor([1.0] * BLOCK + [1e-3]), "int4")
@example(torch.tensor([1.9999, 0.1427]), "int4")  # a step that loses almost all that bf16 can lose
@example(torch.zeros(BLOCK + 1), "int4")
@example(torch.tensor([1e-45] * 3), "int4")
@example(
    torch.tensor([1.2e-39] * BLOCK + [1.0] * BLOCK), "int4"
)  # of too small a step many, in one byte with others
def test_a_code_errs_by_half_a_step(flat: torch.Tensor, wire_format: str) -> None:
    """The error of a value is at most 1/254 (int8) or 1/14 (int4) of the largest of its block of 64."""
    error = (round_trip(flat, wire_format) - flat).abs()
    for first in range(0, len(flat), BLOCK):
        block = slice(first, first + BLOCK)
        half_a_step = flat[block].abs().max() / (2 * CODED[wire_format])
        # 1e-36: a scale below the smallest normal number has no full precision.
        assert error[block].max() <= half_a_step * (1 + 1e-5) + 1e-36


@given(flats(st.integers(1, SMALL), exponents=(-30, 30)))
def test_int4_of_what_was_decoded_is_the_same_bytes(flat: torch.Tensor) -> None:
    """Seven steps of a bf16 scale are exact, so nothing is lost a second time."""
    assert list(encode(round_trip(flat, "int4"), "int4")) == list(encode(flat, "int4"))


def test_bytes_on_the_wire() -> None:
    """An update of 2.44 M values, frames and all, against the 4 bytes a value of fp32."""
    flat = torch.zeros(2_440_000)
    ratios = {name: 4 * len(flat) / sum(map(len, encode(flat, name))) for name in FORMATS}
    assert ratios == pytest.approx({"fp32": 1.0, "bf16": 2.0, "int8": 3.76, "int4": 7.53}, abs=0.01)


@settings(max_examples=20)
@given(seeds, st.sampled_from([1, 64, 65, 201]), coded)
def test_fifty_rounds_lose_nothing(seed: int, numel: int, wire_format: str) -> None:
    """What was sent and what remains is all that was trained, to fp32 rounding; what remains is half a step."""
    meta = first_meta(small_spec())
    base = randn(seed, numel)
    ledger = Ledger(base=base, meta=meta, run=make_run(1, "00000001"))
    local, sent, trained = base.clone(), torch.zeros(numel, dtype=torch.float64), 0.0
    for number in range(50):
        delta = randn(seed + number + 1, numel) * 1e-3
        trained = trained + delta.double()
        local = local + delta
        update = ledger.make_update(ledger.cut(local, wire_format), Trained(steps=1), fingerprint="f")
        sent += delta_of(update, numel)
        applied = Decided(id=update.id, how="applied", version=number + 1)
        change = ledger.observe(meta, ledger.base + delta_of(update, numel), applied, now=0.0)
        local += change.correction
    remains = ledger.progress(local)
    assert (sent + remains - trained).abs().max() < 1e-5
    assert remains.abs().max() < 5e-3 / (2 * CODED[wire_format]) * 1.5 + 1e-5


@given(small_flats, wire_formats)
def test_encoding_is_deterministic_and_idempotent(flat: torch.Tensor, wire_format: str) -> None:
    """What was decoded travels again without further loss, so `pending` is what the aggregator folds."""
    decoded = round_trip(flat, wire_format)
    assert torch.allclose(round_trip(decoded, wire_format), decoded, rtol=1e-6, atol=1e-36)
    assert list(encode(flat, wire_format)) == list(encode(flat.clone(), wire_format))


@given(small_flats, seeds, wire_formats)
def test_a_cut_is_the_progress_encoded(flat: torch.Tensor, seed: int, wire_format: str) -> None:
    """To the byte, with nothing in flight and with an update; its norm is that of the progress."""
    base = randn(seed, len(flat))
    ledger = Ledger(base=base, meta=first_meta(small_spec()), run=make_run(1, "00000001"))
    for _ in range(2):
        progress = ledger.progress(flat).clone()
        cut = ledger.cut(flat, wire_format)
        assert list(cut.parts) == list(encode(progress, wire_format))
        assert cut.norm == pytest.approx(float(progress.double().norm()), rel=1e-5, abs=1e-20)
        ledger.make_update(cut, Trained(steps=1), fingerprint="f")


@pytest.mark.parametrize("wire_format", sorted(FORMATS))
def test_every_second_value_of_a_vector_is_a_vector(wire_format: str) -> None:
    """How the values lie in memory makes no difference."""
    flat = randn(0, 2 * SMALL)[::2]
    assert list(encode(flat, wire_format)) == list(encode(flat.clone(), wire_format))


@pytest.mark.parametrize("wire_format", sorted(FORMATS))
@pytest.mark.parametrize("extra", [-1, 0, 1, BLOCK])
def test_no_part_is_too_large(wire_format: str, extra: int) -> None:
    """Cut at the part border, one below and one above: every value arrives; a part is a mebibyte, or 2 decoded."""
    values = FORMATS[wire_format].values_per_part
    flat = randn(1, 2 * values + extra)
    parts = list(encode(flat, wire_format))
    assert len(parts) == part_count(len(flat), wire_format) == (2 if extra <= 0 else 3)
    assert max(map(len, parts)) <= PART_BYTES
    assert part_lengths(len(flat), wire_format) == [len(part) for part in parts]
    assert (len(parts[0]) > PART_BYTES * 0.99) == (FORMATS[wire_format].bits >= 16)
    assert values <= MAX_VALUES_PER_PART
    out = torch.full_like(flat, torch.nan)
    decode(parts, wire_format, out)
    assert (out - flat).abs().max() < flat.abs().max() / (13 if wire_format == "int4" else 200)


@pytest.mark.parametrize("wire_format", sorted(FORMATS))
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, SMALL - 1])
def test_non_finite_values_are_refused(wire_format: str, poison: float, place: int) -> None:
    """The codec does not hide them: they arrive as they are, or make their block's scale one that is refused."""
    flat = torch.ones(SMALL)
    flat[place] = poison
    spec = small_spec(layout=Layout.of([("a", (SMALL,))]), wire_format=wire_format)
    ledger = Ledger(base=torch.zeros(SMALL), meta=first_meta(spec), run=make_run(1, "00000001"))
    update = ledger.make_update(ledger.cut(flat, wire_format), Trained(steps=1), fingerprint="f")
    now, out = (Values(torch.zeros(SMALL), torch.empty(0)) for _ in range(2))
    space = Workspace(now, out, torch.empty(SMALL))
    verdict = fold_payload(update.header, admission(), update.parts, spec, space)
    assert verdict.outcome is Outcome.REFUSED
    assert "NaN or infinity" in verdict.reason


@given(st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.integers(0, 3), seeds, coded)
def test_non_finite_scales_are_refused(poison: float, block: int, seed: int, wire_format: str) -> None:
    """A forged scale of NaN or infinity, even over codes that are zero; any other number is one."""
    form = FORMATS[wire_format]
    scales = randn(seed, 4).to(form.scale)
    data = bytes(form.data_bytes(SMALL))
    assert not reason(frame(wire_format, scales=raw(scales), data=data), wire_format=wire_format)
    scales[block] = poison
    assert reason(frame(wire_format, scales=raw(scales), data=data), wire_format=wire_format) == "scales"


@pytest.mark.parametrize("count", [1, 2, 63, 200, 201])
def test_no_byte_of_int4_is_wrong(count: int) -> None:
    """Bytes that no encoder writes are numbers like any other, of 8 steps at most."""
    (part,) = encode(torch.full((count,), 7.0), "int4")
    half = (count + 1) // 2
    for byte in range(256):
        out = torch.full((count,), torch.nan)
        decode([part[: len(part) - half] + bytes([byte]) * half], "int4", out)
        code = (byte ^ 128) - 128
        assert (out.abs() <= 8).all()
        assert ((out[: count // 2] + 16 * out[half:] - code) % 256 == 0).all()
        assert ((out[:half] - code) % 16 == 0).all()


@given(st.lists(st.binary(max_size=300) | oddities().map(msgpack.packb), max_size=3), wire_formats)
@example([b""], "fp32")
@example([b"\x81\xa1a" * 900 + b"\xc0"], "fp32")
def test_garbage_is_an_update_error(parts: list[bytes], wire_format: str) -> None:
    """Bytes of any kind raise UpdateError and nothing else."""
    assert reason(*parts, wire_format=wire_format)


@given(st.sampled_from(["format", "first", "count", "scales", "data"]), oddities())
def test_an_odd_field_is_an_update_error(field: str, value: object) -> None:
    """Whatever stands in a field, the frame decodes to the right number of values or raises UpdateError."""
    assert reason(frame(**{field: value})) in ("", field, "length", "msgpack")


@given(seeds, wire_formats, st.integers(1, 8))
def test_damaged_parts_never_raise_anything_else(seed: int, wire_format: str, flips: int) -> None:
    """Flipped, missing and added bytes give other values or an UpdateError."""
    parts = [flip_bytes(part, seed, flips) for part in encode(randn(seed, SMALL), wire_format)]
    refused(*parts, wire_format=wire_format)


@pytest.mark.parametrize("count", [1, 255, 256, 2**16 - 1, 2**16])
@pytest.mark.parametrize("wire_format", sorted(FORMATS))
def test_a_frame_is_what_msgpack_writes(wire_format: str, count: int) -> None:
    """To the byte, also where a length takes one byte more."""
    parts = list(encode(randn(0, max(1, count * 8 // FORMATS[wire_format].bits)), wire_format))
    assert parts == [msgpack.packb(msgpack.unpackb(part)) for part in parts]


@given(st.permutations(["format", "first", "count", "scales", "data"]), wire_formats)
def test_the_order_of_the_fields_is_free(order: list[str], wire_format: str) -> None:
    """Another writer's msgpack is read as well, to the same values, though not without parsing it."""
    (part,) = encode(randn(0, SMALL), wire_format)
    content = msgpack.unpackb(part)
    other, out = msgpack.packb({name: content[name] for name in order}), torch.empty(SMALL)
    decode([other], wire_format, out)
    assert bits(out) == bits(round_trip(randn(0, SMALL), wire_format))


def test_each_refusal_is_about_its_field() -> None:
    """Each rule of a frame, and of the parts together."""
    assert reason(frame(format="fp32")) == "format"
    assert reason(frame(first=64)) == reason(frame(first="x" * 1_000_000)) == "first"
    assert reason(frame(count=2**40)) == "count"
    assert reason(frame(scales=b"")) == reason(frame("int4", scales=bytes(9)), wire_format="int4") == "scales"
    assert reason(frame(data="x" * SMALL)) == "data"
    for length in (0, 99, 101, 200):
        assert reason(frame("int4", data=bytes(length)), wire_format="int4") == "data"
    assert reason(frame("int4")) == "format"
    assert reason(frame(block=0)) == "msgpack"
    assert reason(frame(), frame()) == "parts"
    assert reason() == "values"
    assert reason(b"\0" * (PART_BYTES + 1)) == "length"


def test_messages_name_the_part_what_came_and_what_was_expected() -> None:
    """Also of a value that would fill the screen."""
    assert str(refused(frame(format="fp32"))) == "part 0 says format 'fp32', expected 'int8'"
    assert str(refused(frame(scales=b""))) == "part 0 does not hold 16 bytes of scales"
    text = str(refused(frame(first="x" * 1_000_000)))
    assert re.fullmatch(r"part 0 says first 'x+\.\.\.x+', expected 0", text)


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
        assert reason(bomb) in ("msgpack", "fields")
        assert tracemalloc.get_traced_memory()[1] < 4 * PART_BYTES
    finally:
        tracemalloc.stop()


@given(small_flats, wire_formats, st.booleans(), st.booleans())
def test_parts_in_memory_of_the_caller(
    flat: torch.Tensor, wire_format: str, relative: bool, slowly: bool
) -> None:
    """They are byte for byte those that stand alone, one after the other, with and without the kernels."""
    minus = randn(1, len(flat)) if relative else None
    wanted = b"".join(encode(flat, wire_format, minus=minus))
    found = bytearray(b"\xff" * len(wanted))
    with mock.patch.object(formats, "compiled", return_value=None) if slowly else nullcontext():
        encode_to(memoryview(found), flat, wire_format, minus=minus)
    assert found == wanted


@pytest.mark.parametrize("wire_format", sorted(FORMATS))
def test_several_parts_in_memory_of_the_caller(wire_format: str) -> None:
    """By several threads, with a last part that is not whole."""
    flat = randn(0, 2 * FORMATS[wire_format].values_per_part + 65)
    wanted = b"".join(encode(flat, wire_format))
    found = bytearray(len(wanted))
    with ThreadPoolExecutor(2) as pool:
        encode_to(memoryview(found), flat, wire_format, threads=Threads(pool, 2))
    assert found == wanted
