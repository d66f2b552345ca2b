"""Packed weights, as workers pull them: W − W⁰, the training so far, encoded like an update. Pure.

Quantising W itself would add error to the initialisation. W − W⁰ is small where little was learned, and so is its
quantisation error, at most half a step in each block of 64. The worker's base is W⁰ plus the decoded difference: the
worker trains from this base, and its updates are relative to it. The error neither accumulates nor travels: the
aggregator's own weights are exact, and every commit that changes them packs them again.

Packed weights are one string: a preamble that names their commit and W⁰, then the parts, whose lengths follow from the
spec. So they can be read part by part, at the offsets that `chunks` gives.

In format fp32 nothing is packed: workers pull the exact weights.
"""

import hashlib
import logging
import reprlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch

from fedmoe.errors import SettingsError, UpdateError
from fedmoe.protocol.codec import add, encode_to, part_lengths, scratch_values
from fedmoe.protocol.formats import EXACT
from fedmoe.protocol.layout import Layout, values_of
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.spec import PREAMBLE_BYTES, Spec
from fedmoe.util.threads import ALONE, Threads

_WHAT = b"fedmoe packed 1 "
_ID_BYTES = 16  # length of a commit id, and of the digest of W⁰, both in hex
assert len(_WHAT) + _ID_BYTES + 1 + _ID_BYTES == PREAMBLE_BYTES

logger = logging.getLogger(__name__)


@lru_cache(maxsize=64)  # as many as there are initial weights
def _digest(layout: Layout, seed: int) -> bytes:
    """The digest of W⁰: it detects a party whose torch draws different initial weights."""
    return hashlib.sha256(initial_weights(layout, seed).numpy().data).hexdigest()[:_ID_BYTES].encode()


def _preamble(commit: str, digest: bytes) -> bytes:
    return (_WHAT + commit.encode() + b" " + digest).ljust(PREAMBLE_BYTES)  # tests have shorter commit ids


def packed_commit(preamble: bytes) -> str:
    """The weights commit that this preamble of packed weights names; "" if it is not such a preamble."""
    if not preamble.startswith(_WHAT):
        return ""
    return preamble[len(_WHAT) : len(_WHAT) + _ID_BYTES].decode(errors="backslashreplace")


def pack(weights: torch.Tensor, spec: Spec, commit: str) -> bytes:
    """Pack an expert's weights (numel,) fp32, written by this weights commit."""
    content = bytearray(packed_bytes(spec))
    pack_to(memoryview(content), weights, spec, commit)
    return bytes(content)


def pack_to(
    out: memoryview, weights: torch.Tensor, spec: Spec, commit: str, threads: Threads = ALONE
) -> None:
    """Pack as `pack` does, into memory of the caller, of `packed_bytes`."""
    out[:PREAMBLE_BYTES] = _preamble(commit, _digest(spec.layout, spec.init_seed))
    initial = initial_weights(spec.layout, spec.init_seed)
    encode_to(out[PREAMBLE_BYTES:], weights, spec.wire_format, minus=initial, threads=threads)


def pack_file(file: bytes | memoryview, spec: Spec, commit: str) -> bytes | None:
    """Pack the weights in a safetensors file of that spec; None if workers pull the file itself."""
    return None if spec.wire_format == EXACT else pack(values_of(spec.layout, file), spec, commit)


def chunks(spec: Spec) -> list[tuple[int, int]]:
    """Offsets of the first and last byte of the preamble, and of each part, in packed weights."""
    lengths = (PREAMBLE_BYTES, *part_lengths(spec.layout.numel, spec.wire_format))
    return [(first, after - 1) for first, after in pairwise(accumulate(lengths, initial=0))]


def packed_bytes(spec: Spec) -> int:
    """The length of packed weights; workers of format fp32 pull the weights themselves, and theirs is 0."""
    return 0 if spec.wire_format == EXACT else chunks(spec)[-1][1] + 1


def unpack(
    content: Sequence[bytes], spec: Spec, commit: str, out: torch.Tensor | None = None
) -> torch.Tensor | None:
    """The weights (numel,) fp32 of this weights commit, as every worker decodes them, from the bytes of `chunks`.

    They are written to `out` (numel,) fp32, if it is given.

    None if the content belongs to another commit (the expert was restored), is relative to other initial weights, or is
    not packed weights; the caller then pulls the exact weights, and `out` is undefined.
    """
    preamble, *parts = content
    if not preamble:
        return None  # the key is missing
    digest = _digest(spec.layout, spec.init_seed)
    try:
        if not preamble.startswith(_WHAT):
            raise UpdateError(f"they begin with {reprlib.repr(preamble)}", about="preamble")
        if preamble != _preamble(commit, digest):
            if preamble[:-_ID_BYTES] == _preamble(commit, digest)[:-_ID_BYTES]:
                logger.warning(
                    "this torch draws other initial weights than the aggregator's torch: pulling the exact weights"
                )
            return None
        return _decode(parts, spec, out)
    except UpdateError as error:
        logger.warning(
            "the packed weights are not what this FedMoE writes (%s): another version wrote them, or the key was "
            "overwritten; pulling the exact weights", error,
        )  # fmt: skip
        return None


def unpack_again(content: Sequence[bytes], spec: Spec) -> torch.Tensor:
    """The weights that an earlier `unpack` decoded from these bytes, bit for bit.

    Raises:
        UpdateError: if the bytes are damaged.
        SettingsError: if this torch draws other initial weights than the torch that unpacked them before.
    """
    preamble, *parts = content or (b"",)
    digest = _digest(spec.layout, spec.init_seed)
    if not preamble.startswith(_WHAT) or len(preamble) != PREAMBLE_BYTES:
        raise UpdateError("the packed weights do not begin with their preamble", about="preamble")
    if not preamble.endswith(digest):
        raise SettingsError(
            f"it needs other initial weights than torch {torch.__version__} makes: use the torch version that wrote it",
            about="torch",
        )
    return _decode(parts, spec)


def _decode(parts: Sequence[bytes], spec: Spec, out: torch.Tensor | None = None) -> torch.Tensor:
    initial = initial_weights(spec.layout, spec.init_seed)
    weights = torch.empty(spec.layout.numel, dtype=torch.float32) if out is None else out
    scratch = torch.empty_like(weights[: scratch_values(len(weights))])
    add(parts, spec.wire_format, initial, factor=1.0, out=weights, scratch=scratch)
    return weights
