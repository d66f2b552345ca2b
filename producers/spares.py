"""Spare vectors of an adapter's size: a worker uses its memory again.

The system clears each page of fresh memory before it hands it out, and blocks of this size go back to it when they are
freed. For an adapter of 153 MiB that takes several times as long as copying it, so a worker uses its vectors again.

The caller of `take` owns the vector: it may give it back, hand it on or drop it. After `give` the caller must not use
the vector. A vector that is never given back costs time, because the next one is fresh memory, and nothing else.
"""

from collections import deque

import torch

KEPT = 3  # a worker with a state directory has so many in use at once: copies of its adapter and the optimizer's state


class Spares:
    """Spare vectors (numel,) fp32 on the CPU, at most `KEPT`; any thread may take one and give it back."""

    def __init__(self, numel: int) -> None:
        self._numel = numel
        self._spares: deque[torch.Tensor] = deque(maxlen=KEPT)

    def take(self) -> torch.Tensor:
        """A vector (numel,) fp32 whose values are undefined; a new one if there is no spare one."""
        try:
            return self._spares.pop()
        except IndexError:
            # Whatever a user's training loop has set: other threads write into the vector, too.
            with torch.inference_mode(False):
                return torch.empty(self._numel, dtype=torch.float32, device="cpu")

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the CPU of any tensor, in a spare vector if it fits."""
        tensor = tensor.detach()
        return self.take().copy_(tensor) if self._fits(tensor) else tensor.to("cpu", copy=True)

    def give(self, tensor: torch.Tensor) -> None:
        """Give back a tensor on the CPU; one that is no such vector is dropped."""
        if self._fits(tensor):
            self._spares.append(tensor)

    def _fits(self, tensor: torch.Tensor) -> bool:
        return tensor.shape == (self._numel,) and tensor.dtype == torch.float32
