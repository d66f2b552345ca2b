"""The error of every merge method on the same experts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from consumers.gateway.inputs import as_input
from consumers.gateway.merge import MergeInput, merge
from consumers.gateway.methods import METHODS
from fedmoe.errors import SettingsError, SpecError, UnknownExpertError
from fedmoe.protocol.fit import Weights
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.store.gateway import GatewayStore


class Compared(NamedTuple):
    """One method: rank of its result and relative error (see `Merged`), or why it cannot merge these experts."""

    method: str
    rank: int | None = None
    error: float | None = None
    reason: str = ""


def compare_present(store: GatewayStore, weights: Weights) -> list[Compared]:
    """Compare the methods on the experts as they are now.

    Args:
        store: of the federation.
        weights: expert → its weight in each group of layers; those that are gone do not count.

    Raises:
        FedMoEError: if an expert cannot be read, or none is left.
    """
    experts = []
    specs = {name: store.spec(name) for name in weights if name in store.experts()}
    for name, spec in specs.items():
        _, file = store.read(name)
        experts.append(replace(as_input(spec, file), in_groups=weights[name]))
    if not experts:
        raise UnknownExpertError("none of the experts that it was built from is there", about="experts")
    first = next(iter(specs.values()))
    return compare(experts, scale=None, rank=None, init=initial_weights(first.layout, first.init_seed))


def compare(
    experts: Sequence[MergeInput], *, scale: float | None, rank: int | None, init: Tensor | None
) -> list[Compared]:
    """Merge the experts with every method; the arguments are those of `merge`, `rank` of methods that can choose one.

    Raises:
        SettingsError: if there is no expert with weight.
    """
    found = []
    for name, method in METHODS.items():
        try:
            merged = merge(
                experts,
                method=name,
                scale=scale,
                rank=rank if method.can_choose_rank else None,
                init=init if method.needs_init else None,
            )
        except (SettingsError, SpecError) as error:
            found.append(Compared(name, reason=str(error)))
        else:
            found.append(Compared(name, merged.rank, merged.relative_error))
    return found
