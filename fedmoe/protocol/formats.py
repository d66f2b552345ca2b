"""Wire formats: how the values of a part become bytes, and how they are folded from them.

    format  bytes a value  loss
    fp32    4              nothing
    bf16    2              16 of 24 significant bits
    int8    1.0625         to 1/254 of the largest value of each block of 64
    int4    0.53125        to 1/14 of the largest value of each block of 64

The training does not lose the quantisation error: it stays in the worker's progress (see producers/ledger.py).

int8 and int4 quantise a value to an integer code (-127..127, -7..7) times its block's scale. Two int4 codes a and b
make one signed byte a + 16 b; a belongs to the first half of the part's values, b to the second (with an odd count,
the last byte has b = 0). Every byte can be decoded: a byte that no encoder writes gives codes between -8 and 8.

`kernels.c` does the same in one pass over memory. It is used where it can be compiled and gives the same bits; the
methods named `by_torch` are the reference.
"""

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from fedmoe.errors import SettingsError, UpdateError
from fedmoe.protocol.kernels import Kernels
from fedmoe.protocol.update import PART_BYTES

EXACT = "fp32"  # lossless: the values need no decoding
FRAME_BYTES = 256  # room for the frame around the values
BLOCK = 64  # values that share a scale; every part but the last is a multiple of it
# As many as fit into a part in bf16 (fp32: half as many): a fold holds one decoded part, at most 2 MiB.
MAX_VALUES_PER_PART = (PART_BYTES - FRAME_BYTES) // (BLOCK * 2) * BLOCK
# Blocks encoded at once: allocating memory costs more than encoding, so all chunks share one small scratch tensor.
_CHUNK = 4096
_TINY = torch.finfo(torch.float32).tiny


# Parts are decoded without a copy. torch warns that it cannot protect the read-only buffer; nothing writes to it.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


logger = logging.getLogger(__name__)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


def _raw(view: memoryview) -> torch.Tensor:
    return torch.frombuffer(view, dtype=torch.uint8) if view else torch.empty(0, dtype=torch.uint8)


class Encoded(NamedTuple):
    """The bytes of the scales and of the values; `squares` gives the squared L2 norm of what was encoded."""

    scales: memoryview
    data: memoryview
    squares: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Format:
    """One wire format.

    Args:
        name: in the spec and the frames.
        bits: per value.
        dtype: of the values; of the codes (int8) if they are quantised.
        limit: the largest code, 0 if values are not quantised.
        scale: dtype of the blocks' scales.
    """

    name: str
    bits: int
    dtype: torch.dtype
    limit: int = 0
    scale: torch.dtype = torch.float32

    @property
    def values_per_part(self) -> int:
        """Values in a full part."""
        return MAX_VALUES_PER_PART * 16 // max(16, self.bits)

    @property
    def part_bytes(self) -> int:
        """Bytes of values and scales in a full part."""
        return self.data_bytes(self.values_per_part) + self.scale_bytes(self.values_per_part)

    def data_bytes(self, count: int) -> int:
        """Bytes of `count` values."""
        return -(-count * self.bits // 8)

    def scale_bytes(self, count: int) -> int:
        """Bytes of the scales of `count` values."""
        return -(-count // BLOCK) * self.scale.itemsize if self.limit else 0

    def encode(self, values: torch.Tensor, minus: torch.Tensor | None = None) -> "Encoded":
        """Encode (n,) fp32 values, or their difference to `minus`."""
        if self.limit and (kernels := compiled()):
            return self.encode_by(kernels, values, minus)
        return self.encode_by_torch(values if minus is None else values - minus)

    def encode_to(
        self, values: torch.Tensor, minus: torch.Tensor | None, scales: memoryview, data: memoryview
    ) -> None:
        """Encode as `encode` does, into memory of the caller, which has `scale_bytes` and `data_bytes`."""
        if self.limit and (kernels := compiled()):
            kernels.encode(self.bits, values, minus, _raw(scales), _raw(data))
            return
        encoded = self.encode_by_torch(values if minus is None else values - minus)
        scales[:], data[:] = encoded.scales, encoded.data

    def encode_by(self, kernels: Kernels, values: torch.Tensor, minus: torch.Tensor | None) -> "Encoded":
        """The same as `encode`, of a format that quantises."""
        count = len(values)
        scales = torch.empty(self.scale_bytes(count), dtype=torch.uint8)
        data = torch.empty(self.data_bytes(count), dtype=torch.uint8)
        squares = kernels.encode(self.bits, values, minus, scales, data)
        return Encoded(scales.numpy().data, data.numpy().data, lambda: squares)

    def encode_by_torch(self, values: torch.Tensor) -> "Encoded":
        """Encode (n,) fp32 values."""
        return Encoded(*self._quantised(values), lambda: squared_norm(values))

    def _quantised(self, values: torch.Tensor) -> tuple[memoryview, memoryview]:
        if not self.limit:
            return memoryview(b""), _bytes(values.to(self.dtype))
        n = len(values)
        if n % BLOCK:
            values = torch.nn.functional.pad(values, (0, -n % BLOCK))
        blocks = values.view(-1, BLOCK)
        scales = torch.empty(len(blocks), dtype=self.scale)
        codes = torch.empty(blocks.shape, dtype=torch.int8)
        scratch = torch.empty(min(len(blocks), _CHUNK), BLOCK, dtype=torch.float32)
        chunks = (torch.split(tensor, _CHUNK) for tensor in (blocks, scales, codes))
        for block, scale, code in zip(*chunks, strict=True):
            steps = torch.abs(block, out=scratch[: len(block)])
            scale.copy_(_shorten(steps.amax(dim=1).div_(self.limit), self.scale))
            torch.div(block, scale.float().clamp(min=_TINY).unsqueeze(1), out=steps)
            code.copy_(steps.round_())
        flat = codes.view(-1)
        if self.bits == 4:
            half = -(-n // 2)
            return _bytes(scales), _bytes(flat[:half].add_(flat[half : 2 * half], alpha=16))
        return _bytes(scales), _bytes(flat[:n])

    def fold(
        self,
        scales: memoryview,
        data: memoryview,
        now: torch.Tensor,
        factor: float,
        out: torch.Tensor,
        scratch: torch.Tensor,
    ) -> float:
        """Write `now` + factor × Δ to `out`, (n,) fp32 each and possibly the same; returns Δ's squared L2 norm.

        The product is rounded to fp32, and then the sum. The caller has checked the lengths. `scratch` is (n,) fp32.
        The norm is infinite if a code times its scale is beyond fp32; the last digits of another one depend on how it
        is added up, and so on whether the kernels are used.

        Raises:
            UpdateError: if a scale is not finite; `out` is then undefined.
        """
        if kernels := compiled():
            return self.fold_by(kernels, scales, data, now, factor, out)
        return self.fold_by_torch(scales, data, now, factor, out, scratch)

    def fold_by(
        self,
        kernels: Kernels,
        scales: memoryview,
        data: memoryview,
        now: torch.Tensor,
        factor: float,
        out: torch.Tensor,
    ) -> float:
        """The same as `fold`."""
        squares = kernels.fold(self.bits, _raw(scales), _raw(data), now, factor, out)
        if self.limit and not math.isfinite(squares):
            self._scales(scales)
        return squares

    def fold_by_torch(
        self,
        scales: memoryview,
        data: memoryview,
        now: torch.Tensor,
        factor: float,
        out: torch.Tensor,
        scratch: torch.Tensor,
    ) -> float:
        """The same as `fold`."""
        values = self.decode(scales, data, scratch)
        squares = squared_norm(values)
        torch.add(now, torch.mul(values, factor, out=scratch), out=out)
        return squares

    def _scales(self, scales: memoryview) -> torch.Tensor:
        """The scales (blocks,) fp32; raises UpdateError if one is not finite."""
        factors = torch.frombuffer(scales, dtype=self.scale).float()
        if not math.isfinite(factors.abs().amax()):  # amax is NaN if one of them is
            raise UpdateError("has a scale that is not finite (NaN or infinity)", about="scales")
        return factors

    def decode(self, scales: memoryview, data: memoryview, out: torch.Tensor) -> torch.Tensor:
        """The values (n,) fp32: decoded into `out`; fp32 data as a view. The caller has checked the lengths.

        Raises:
            UpdateError: if a scale is not finite.
        """
        if not self.limit:
            values = torch.frombuffer(data, dtype=self.dtype)
            return values if values.dtype == out.dtype else out.copy_(values)
        factors = self._scales(scales)
        codes = torch.frombuffer(data, dtype=torch.int8)
        if self.bits == 4:
            _unpack(codes, out)
        else:
            out.copy_(codes)
        whole = len(out) // BLOCK * BLOCK
        out[:whole].view(-1, BLOCK).mul_(factors[: whole // BLOCK].unsqueeze(1))
        if whole < len(out):
            out[whole:].mul_(factors[-1])
        return out


def squared_norm(values: torch.Tensor) -> float:
    """Square of the L2 norm of fp32 values; infinite or NaN only if a value is."""
    norm = float(torch.linalg.vector_norm(values))
    if not math.isfinite(norm):  # maybe because fp32 overflows
        norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    return norm * norm


def _shorten(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Reduce the scales, in place, to the precision of their dtype.

    bf16 scales are truncated, not rounded up, so that no scale exceeds the largest value of its block divided by 7.
    Seven times a scale of 8 significant bits is exact in fp32, so encoding decoded values gives the same bytes again.
    """
    if dtype == torch.bfloat16:
        scales.view(torch.int32).bitwise_and_(-(2**16))
    return scales


def _unpack(pairs: torch.Tensor, out: torch.Tensor) -> None:
    """Split the bytes a + 16 b (half,) int8 into the codes a and b, in `out` (n,) fp32.

    For a byte that no encoder writes, adding 8 may wrap around.
    """
    half = len(pairs)
    codes = torch.add(pairs, 8).bitwise_right_shift_(4)
    out[half:].copy_(codes[: len(out) - half])
    out[:half].copy_(torch.sub(pairs, codes, alpha=16, out=codes))


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(EXACT, 32, torch.float32),
        Format("bf16", 16, torch.bfloat16),
        Format("int8", 8, torch.int8, 127),
        Format("int4", 4, torch.int8, 7, torch.bfloat16),
    )
}


@lru_cache(maxsize=1)
def compiled() -> Kernels | None:
    """The compiled kernels; None where they cannot be compiled, or give other bits than torch."""
    try:
        kernels = Kernels()
    except SettingsError as error:
        logger.info("updates are encoded and folded by torch, which takes several times as long: %s", error)
        return None
    if odd := [form.name for form in FORMATS.values() if not _agrees(form, kernels)]:
        logger.warning(
            "the compiled kernels give other bits than torch in format %s, so torch is used, which takes several times "
            "as long: is it an unusual compiler?", odd[0],
        )  # fmt: skip
        return None
    return kernels


def _agrees(form: Format, kernels: Kernels) -> bool:
    """True if the kernels give the same bits as torch for a few values of every size, and a part that is not whole."""
    count, factor = 20 * BLOCK + 13, 0.3
    chance = torch.Generator().manual_seed(0)
    values, now = torch.rand(2, count, generator=chance, dtype=torch.float32).sub_(0.5)
    values *= torch.logspace(-44, 37, count, dtype=torch.float32)
    scales, data, _ = form.encode_by_torch(values - now)
    ours, torchs, scratch = torch.empty(3, count, dtype=torch.float32)
    form.fold_by(kernels, scales, data, now, factor, ours)
    form.fold_by_torch(scales, data, now, factor, torchs, scratch)
    same = not form.limit or form.encode_by(kernels, values, now)[:2] == (scales, data)
    return same and ours.numpy().tobytes() == torchs.numpy().tobytes()
