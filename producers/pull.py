"""A pull: the expert's weights as a vector, with its meta and the worker's own last decided update."""

from dataclasses import dataclass

import torch

from fedmoe.protocol.layout import values_of_chunks
from fedmoe.protocol.packed import unpack
from fedmoe.protocol.records import Decided, Meta
from fedmoe.protocol.spec import Spec
from fedmoe.store.worker import WorkerStore
from producers.spares import Spares


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


def pull(store: WorkerStore, spec: Spec, *, known: str, spares: Spares | None = None) -> Pulled:
    """Read the expert, and its weights unless their commit is `known`; raises what WorkerStore.pull raises.

    The weights are written to one of the `spares`, if they are given.
    """
    spares = spares or Spares(spec.layout.numel)
    found = store.pull(spec, known=known)
    if found.packed:
        out = spares.take()
        if unpack(found.packed, spec, found.meta.weights_commit, out) is not None:
            return Pulled(found.meta, found.decided, out, found.packed)
        spares.give(out)
        # The packed weights were overwritten, or were made from other initial weights.
        found = store.pull_exact(spec)
    exact = values_of_chunks(spec.layout, found.exact, spares.take()) if found.exact else None
    return Pulled(found.meta, found.decided, exact)
