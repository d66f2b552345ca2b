"""Packs the weights of one expert for its workers, each time into the same memory."""

import torch

from consumers.payload import MANY_PARTS
from fedmoe.protocol.codec import part_count
from fedmoe.protocol.packed import pack_to, packed_bytes
from fedmoe.protocol.spec import Spec
from fedmoe.util.threads import ALONE, Threads


class Packer:
    """Memory for the packed weights of an expert, taken with the first ones; `threads` pack large ones."""

    def __init__(self, spec: Spec, threads: Threads = ALONE) -> None:
        self._spec = spec
        is_large = part_count(spec.layout.numel, spec.wire_format) >= MANY_PARTS
        self._threads = threads if is_large else ALONE
        self._content: torch.Tensor | None = None

    def pack(self, weights: torch.Tensor, commit: str) -> memoryview:
        """Pack weights (numel,) fp32, written by this weights commit; the next call overwrites the result."""
        if self._content is None:
            self._content = torch.empty(packed_bytes(self._spec), dtype=torch.uint8)
        packed: memoryview = self._content.numpy().data
        pack_to(packed, weights, self._spec, commit, self._threads)
        return packed
