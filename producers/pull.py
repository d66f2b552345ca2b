"""A pull: the expert's weights as a vector, with its meta and the worker's own last decided update."""

from dataclasses import dataclass

import torch

from fedmoe.protocol.layout import values_of_chunks
from fedmoe.protocol.packed import unpack
from fedmoe.protocol.records import Decided, Meta
from fedmoe.protocol.spec import Spec
from fedmoe.store.worker import WorkerStore


@dataclass(frozen=True, slots=True)
class Pulled:
    """An expert and the worker's own last decided update, read at one moment.

    `weights` (numel,) fp32, in memory of their own; None if the caller has them already, or if the expert was created
    again with another spec. `packed`: the bytes from which they were unpacked, () for exact weights.
    """

    meta: Meta
    decided: Decided | None
    weights: torch.Tensor | None
    packed: tuple[bytes, ...] = ()


def pull(store: WorkerStore, spec: Spec, *, known: str) -> Pulled:
    """Read the expert, and its weights unless their commit is `known`; raises what WorkerStore.pull raises."""
    found = store.pull(spec, known=known)
    if found.packed:
        weights = unpack(found.packed, spec, found.meta.weights_commit)
        if weights is not None:
            return Pulled(found.meta, found.decided, weights, found.packed)
        # The packed weights were overwritten, or were made from other initial weights.
        found = store.pull_exact(spec)
    exact = values_of_chunks(spec.layout, found.exact) if found.exact else None
    return Pulled(found.meta, found.decided, exact)
