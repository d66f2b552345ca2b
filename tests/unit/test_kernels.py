"""fedmoe/protocol/kernels.c: the same bits as torch gives, whatever the values, the length and the bytes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fedmoe.errors import SettingsError, UpdateError
from fedmoe.protocol import formats
from fedmoe.protocol.formats import BLOCK, FORMATS, Format, compiled
from fedmoe.protocol.kernels import Kernels
from tests.compilers import need_compiler
from tests.strategies import seeds, wire_formats

KINDS = ("ordinary", "tiny", "subnormal", "wide", "any bits")
CODED = st.sampled_from(sorted(name for name, form in FORMATS.items() if form.limit))
kinds = st.sampled_from(KINDS)
counts = st.integers(1, 5 * BLOCK)
factors = st.sampled_from([1.0, -1.0, 0.3, 1e-3, 1000.0])
pytestmark = [pytest.mark.one_server, pytest.mark.usefixtures("kernels")]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """The compiled kernels."""
    need_compiler()
    found = compiled()
    assert found is not None
    return found


def values_of(kind: str, seed: int, count: int) -> torch.Tensor:
    """Values (count,) fp32 of a kind, zeros of both signs among them."""
    chance = np.random.default_rng(seed)
    if kind == "any bits":  # NaN and infinity, too
        values = chance.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
    else:
        low, high = {"ordinary": (-3, 1), "tiny": (-39, -34), "subnormal": (-45, -37), "wide": (-45, 38)}[
            kind
        ]
        with np.errstate(over="ignore"):
            size = 10.0 ** chance.uniform(low, high, count)
            values = (chance.standard_normal(count).clip(-3, 3) * size).astype(np.float32)
    values[chance.random(count) < 0.1] = 0.0
    values[chance.random(count) < 0.1] = -0.0
    return torch.from_numpy(values)


def same(ours: torch.Tensor, torchs: torch.Tensor) -> bool:
    """True if the bits are the same, or both NaN: which NaN, nobody promises."""
    equal = ours.view(torch.int32) == torchs.view(torch.int32)
    return bool((equal | (ours.isnan() & torchs.isnan())).all())


def scales_of(form: Format, scales: memoryview) -> torch.Tensor:
    return torch.frombuffer(bytearray(scales), dtype=form.scale).float()


@given(CODED, kinds, kinds, seeds, counts, st.booleans())
@example("int4", "any bits", "any bits", 0, 1, False)
@example("int4", "ordinary", "ordinary", 0, 2 * BLOCK + 1, True)
def test_the_same_bytes(name: str, kind: str, other: str, seed: int, count: int, relative: bool) -> None:
    """Of values, and of their difference to others."""
    form, kernels = FORMATS[name], compiled()
    assert kernels is not None
    values = values_of(kind, seed, count)
    minus = values_of(other, seed + 1, count) if relative else None
    ours = form.encode_by(kernels, values, minus)
    torchs = form.encode_by_torch(values if minus is None else values - minus)
    assert same(scales_of(form, ours[0]), scales_of(form, torchs[0]))
    assert ours[1] == torchs[1]
    squares, wanted = ours.squares(), torchs.squares()
    assert squares == pytest.approx(wanted, rel=1e-5, abs=1e-40, nan_ok=True)


@given(wire_formats, kinds, kinds, seeds, counts, factors, st.booleans())
@example("int4", "any bits", "any bits", 0, 1, 1.0, False)
@example("int4", "ordinary", "ordinary", 0, 2 * BLOCK + 1, 0.3, True)
@example("int4", "ordinary", "ordinary", 0, 3 * BLOCK + 1, 0.3, False)
def test_the_same_weights(
    name: str, kind: str, other: str, seed: int, count: int, factor: float, in_place: bool
) -> None:
    """Folded from what an encoder never writes: any bytes, and scales of any size."""
    form, kernels = FORMATS[name], compiled()
    assert kernels is not None
    now = values_of(other, seed, count)
    if form.limit:
        scales = values_of(kind, seed + 1, form.scale_bytes(count) // form.scale.itemsize).to(form.scale)
        data = np.random.default_rng(seed).integers(0, 256, form.data_bytes(count), dtype=np.uint8).data
        raw = scales.view(torch.uint8).numpy().data
    else:
        raw, data, _ = form.encode_by_torch(values_of(kind, seed + 1, count))
    data = memoryview(b"\0" + bytes(data))[1:]  # at an odd address
    ours, torchs = (now.clone() if in_place else torch.full_like(now, torch.nan) for _ in range(2))
    try:
        wanted = form.fold_by_torch(
            raw, data, torchs if in_place else now, factor, torchs, torch.empty(count)
        )
    except UpdateError:
        with pytest.raises(UpdateError, match="scale"):
            form.fold_by(kernels, raw, data, ours if in_place else now, factor, ours)
        return
    squares = form.fold_by(kernels, raw, data, ours if in_place else now, factor, ours)
    assert same(ours, torchs)
    assert squares == pytest.approx(wanted, rel=1e-5, abs=1e-40, nan_ok=True)


@given(CODED, st.floats(118, 128), st.sampled_from([1.0, -1.0]), seeds, counts)
@example("int8", 121.0, 1.0, 0, 1)
@example("int4", 125.5, -1.0, 0, 2 * BLOCK + 1)
def test_the_same_norm_where_codes_overflow(
    name: str, exponent: float, sign: float, seed: int, count: int
) -> None:
    """A finite scale times a code can be infinite: so is the norm then, and no scale is blamed for it."""
    form, kernels = FORMATS[name], compiled()
    assert kernels is not None
    chance = np.random.default_rng(seed)
    scales = torch.full((form.scale_bytes(count) // form.scale.itemsize,), sign * 2.0 ** min(exponent, 127.9))
    raw = scales.to(form.scale).view(torch.uint8).numpy().data
    data = chance.integers(0, 256, form.data_bytes(count), dtype=np.uint8).data
    now, out = torch.zeros(2, count)
    wanted = form.fold_by_torch(raw, data, now, 1.0, out, torch.empty(count))
    assert math.isinf(wanted) is bool(out.isinf().any())
    assert form.fold_by(kernels, raw, data, now, 1.0, out) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("less", [0, 1, BLOCK, BLOCK + 1])
def test_a_whole_part_and_a_little_less(name: str, less: int) -> None:
    """Also where the halves of an int4 part meet within a block."""
    form, kernels = FORMATS[name], compiled()
    assert kernels is not None
    count = form.values_per_part - less
    values, minus, now = (values_of("ordinary", seed, count) for seed in range(3))
    raw = form.encode_by_torch(values - minus)[:2]
    assert not form.limit or form.encode_by(kernels, values, minus)[:2] == raw
    ours, torchs = torch.empty(2, count)
    squares = form.fold_by(kernels, *raw, now, 0.3, ours)
    wanted = form.fold_by_torch(*raw, now, 0.3, torchs, torch.empty(count))
    assert torch.equal(ours, torchs)
    assert squares == pytest.approx(wanted, rel=1e-3)  # torch adds up in fp32


def test_other_bits_are_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A compiler may break the rules: then torch does the work, and one sentence says so."""
    whole = Kernels.fold

    def fused(self: Kernels, bits: int, scales: torch.Tensor, data: torch.Tensor, now: torch.Tensor, factor: float,
              out: torch.Tensor) -> float:  # fmt: skip
        squares = whole(self, bits, scales, data, now, factor, out)
        out.view(torch.int32)[100] ^= 1
        return squares

    monkeypatch.setattr(Kernels, "fold", fused)
    assert compiled.__wrapped__() is None
    (line,) = caplog.messages
    assert "give other bits than torch" in line


def test_without_a_compiler_torch_does_the_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To the same bytes."""
    values, now = values_of("ordinary", 0, 200), values_of("ordinary", 1, 200)
    form = FORMATS["int4"]
    before, out = form.encode(values, now)[:2], torch.empty(200)
    form.fold(*before, now, 0.3, out, torch.empty(200))

    def load(*_: object) -> None:
        raise SettingsError("there is no C compiler", about="compiler")

    monkeypatch.setattr("fedmoe.protocol.kernels.load", load)
    caplog.set_level("INFO")
    monkeypatch.setattr(formats, "compiled", compiled.__wrapped__)
    assert form.encode(values, now)[:2] == before
    assert "by torch" in caplog.messages[0]
    slowly = torch.empty(200)
    form.fold(*before, now, 0.3, slowly, torch.empty(200))
    assert torch.equal(slowly, out)
