"""The LoRA initialisation that all experts of a base model share: version 0 of each.

Averaging LoRA factors has the error Σ wᵢ (Bᵢ−B̄)(Aᵢ−Ā), which is zero while all A are equal: hence one A for all.
"""

import hashlib
from functools import lru_cache

import torch

from fedmoe.protocol.layout import AdapterBuffer, Layout


@lru_cache(maxsize=64)  # one for each base model and LoRA shape that a process serves
def initial_weights(layout: Layout, seed: int) -> torch.Tensor:
    """The flat vector (numel,) fp32 of an untrained adapter: B = 0, A uniform in ±1/√in, as in peft.

    A tensor depends only on the seed, its name and its shape. The draws are multiples of 2⁻²⁴ and are rounded once, so
    every machine gets the same bits. Source: arXiv 1502.01852 (Kaiming, with a = √5).

    The vector is cached and all callers share it: copy it before you change it.
    """
    flat = torch.zeros(layout.numel, dtype=torch.float32)
    for name, view in layout.views(flat).items():
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(_tensor_seed(seed, name))
            torch.rand(view.shape, generator=generator, out=view)
            view.mul_(2).sub_(1).mul_(view.shape[1] ** -0.5)
    return flat


def initial_adapter(layout: Layout, seed: int) -> AdapterBuffer:
    """An untrained adapter in memory of its own."""
    buffer = AdapterBuffer(layout)
    buffer.flat.copy_(initial_weights(layout, seed))
    return buffer


def _tensor_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]) >> 1
