"""The weights as workers pull them: what an expert has learned so far, W − W⁰, encoded as updates are. Pure.

Encoding the weights themselves would blur the initialisation, whose values never move far; their difference to it is
small where little was learned, and so is its error, at most half a step of each block of 64. A worker's base is then
W⁰ + what it decoded: it trains from there, and what it publishes is relative to that. The error is neither summed up
nor sent: the aggregator's own weights are exact, and every commit that changes them packs them anew.

In format fp32 nothing is packed: workers pull the weights themselves.
"""

import hashlib
import logging
from functools import lru_cache
from typing import Any

import msgpack
import torch

from fedmoe.codec import decode, encode
from fedmoe.layout import Layout
from fedmoe.lora_init import initial_weights
from fedmoe.spec import Spec
from fedmoe.update import MAX_PARTS

logger = logging.getLogger(__name__)


@lru_cache(maxsize=64)  # one for each base model and LoRA shape that a process serves
def _initial(layout: Layout, seed: int) -> tuple[torch.Tensor, bytes]:
    """W⁰ and its digest, so that a party whose random numbers are others is noticed."""
    weights = initial_weights(layout, seed)
    return weights, hashlib.sha256(weights.numpy().data).digest()[:8]


def pack(weights: torch.Tensor, spec: Spec, commit: str) -> bytes:
    """Encode an expert's weights (numel,) fp32 of this `weights_commit`."""
    initial, digest = _initial(spec.layout, spec.init_seed)
    parts = list(encode(weights, spec.wire_format, minus=initial))
    return bytes(msgpack.packb({"weights_commit": commit, "initial": digest, "parts": parts}))


def unpack(content: bytes, spec: Spec, commit: str) -> torch.Tensor | None:
    """The weights (numel,) fp32 of this `weights_commit`, as every worker decodes them.

    None if they are of another commit (the expert was restored), relative to other initial weights, or not packed
    weights at all: the exact ones serve.
    """
    initial, digest = _initial(spec.layout, spec.init_seed)
    try:
        packed: Any = msgpack.unpackb(content, max_array_len=MAX_PARTS, max_map_len=3)
        if packed["weights_commit"] != commit:
            return None
        if packed["initial"] != digest:
            logger.warning(
                "this torch draws other initial weights than the aggregator's: pulling the exact weights"
            )
            return None
        weights = torch.empty(spec.layout.numel)
        decode(packed["parts"], spec.wire_format, weights, plus=initial)
    except Exception as error:  # msgpack raises half a dozen unrelated types on garbage
        logger.warning(
            "the packed weights are not what this FedMoE writes (%s): another version's, or overwritten; pulling the "
            "exact ones", error,
        )  # fmt: skip
        return None
    return weights
