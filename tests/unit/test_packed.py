"""fedmoe.protocol.packed: what a worker's base loses, and that whatever else lies under that key is told from it."""

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.protocol.codec import decode, encode
from fedmoe.protocol.formats import BLOCK, compiled
from fedmoe.protocol.kernels import Kernels
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.packed import chunks, pack, unpack
from tests.federation import small_spec
from tests.strategies import flip_bytes, oddities, randn, seeds

LAYOUT = Layout.of([("x.lora_A.weight", (4, 80)), ("x.lora_B.weight", (100, 4))])
lossy = st.sampled_from(["bf16", "int8", "int4"])
COMMIT = "0123456789abcdef"
STEPS = {"bf16": 256, "int8": 254, "int4": 14}  # a value is off by at most 1 / so many of its block's largest


def packed(weights: torch.Tensor, wire_format: str, commit: str = COMMIT) -> bytes:
    spec = small_spec(layout=LAYOUT, wire_format=wire_format)
    return pack(weights, spec, commit)


def unpacked(content: bytes, wire_format: str, commit: str = COMMIT) -> torch.Tensor | None:
    """As a worker reads it: Redis gives of each chunk what is there."""
    spec = small_spec(layout=LAYOUT, wire_format=wire_format)
    return unpack([content[first : last + 1] for first, last in chunks(spec)], spec, commit)


@given(lossy, seeds, st.floats(1e-6, 10))
def test_only_what_was_learned_is_blurred(wire_format: str, seed: int, scale: float) -> None:
    """The error is that of the change since version 0, however large the initial values are."""
    initial = initial_weights(LAYOUT, 0)
    change = randn(seed, LAYOUT.numel) * scale
    weights = unpacked(packed(initial + change, wire_format), wire_format)
    assert weights is not None
    rest = torch.nn.functional.pad((weights - initial - change).abs(), (0, -LAYOUT.numel % BLOCK))
    largest = torch.nn.functional.pad(change.abs(), (0, -LAYOUT.numel % BLOCK)).view(-1, BLOCK).amax(dim=1)
    bound = largest * 1.01 / STEPS[wire_format] + 1e-6  # the sum with the initial values is rounded, too
    assert (rest.view(-1, BLOCK) <= bound.unsqueeze(1)).all()


@given(lossy, seeds)
def test_every_worker_decodes_the_same(wire_format: str, seed: int) -> None:
    """Bit for bit the initial weights plus the decoded change."""
    initial = initial_weights(LAYOUT, 0)
    weights = initial + randn(seed, LAYOUT.numel) * 0.01
    change = torch.empty(LAYOUT.numel)
    decode(encode(weights - initial, wire_format), wire_format, change)
    got = unpacked(packed(weights, wire_format), wire_format)
    assert got is not None
    assert torch.equal(got, change + initial)


@given(lossy)
def test_version_0_is_exact(wire_format: str) -> None:
    """Nothing was learned, so nothing is blurred."""
    initial = initial_weights(LAYOUT, 0)
    got = unpacked(packed(initial, wire_format), wire_format)
    assert got is not None
    assert torch.equal(got, initial)


@pytest.mark.parametrize("kernels", [compiled(), None])
def test_the_default_dtype_changes_nothing(
    kernels: Kernels | None, of_bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training loop of one's own may have set it: weights are fp32 all the same, in memory of that size."""
    monkeypatch.setattr("fedmoe.protocol.formats.compiled", lambda: kernels)
    weights = torch.arange(LAYOUT.numel, dtype=torch.float32) / 1000
    found = unpacked(packed(weights, "int4"), "int4")
    torch.set_default_dtype(torch.float32)
    initial_weights.cache_clear()
    wanted = unpacked(packed(weights, "int4"), "int4")
    assert found is not None
    assert wanted is not None
    assert torch.equal(found, wanted)


def test_weights_of_another_commit_are_not_taken() -> None:
    """The expert was restored, and its packed weights are those of before."""
    assert unpacked(packed(initial_weights(LAYOUT, 0), "int4", COMMIT), "int4", COMMIT[::-1]) is None


@given(st.binary(max_size=2000) | oddities().map(msgpack.packb), st.booleans())
def test_anything_else_is_not_taken(content: bytes, after_the_preamble: bool) -> None:
    """Any bytes, also after the right preamble."""
    preamble = packed(initial_weights(LAYOUT, 0), "int4")[: chunks(small_spec(layout=LAYOUT))[0][1] + 1]
    assert unpacked((preamble if after_the_preamble else b"") + content, "int4") is None


@pytest.mark.parametrize("cut", [1, 49, 50, 300])
def test_weights_that_are_cut_off_are_not_taken(cut: int) -> None:
    """As many bytes as there are, and not one more, are what was packed."""
    content = packed(initial_weights(LAYOUT, 0), "int4")
    assert unpacked(content, "int4") is not None
    assert unpacked(content[:-cut], "int4") is None
    assert unpacked(content[:cut], "int4") is None


@pytest.mark.parametrize("wire_format", ["int8", "bf16"])
def test_another_format_is_not_taken(wire_format: str) -> None:
    """The spec says how they are packed."""
    assert unpacked(packed(initial_weights(LAYOUT, 0), wire_format), "int4") is None


@given(seeds, st.integers(1, 20))
def test_damaged_bytes_stop_nobody(seed: int, flips: int) -> None:
    """Whatever bytes are flipped, missing or too many: taken or not, never an exception."""
    unpacked(flip_bytes(packed(initial_weights(LAYOUT, 0) + 0.01, "int4"), seed, flips), "int4")
