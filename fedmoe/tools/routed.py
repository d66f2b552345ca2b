"""The rows of `fedmoe evaluate` in which a router chooses the expert: by domain vectors, and by arrow."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from fedmoe.data.encode import Example
from fedmoe.errors import SettingsError
from fedmoe.model.hidden import prompt_states
from fedmoe.protocol.spec import Spec
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.arrow import arrow_loaded
from fedmoe.tools.base import Base
from fedmoe.tools.evaluate import Adapter, Loads, RowLosses
from fedmoe.tools.routing import BY_ARROW, BY_VECTORS, check_arrow, check_number, read_router, routed_losses

Routes = dict[str, dict[str, int]]  # domain -> expert -> number of rows


def arrow_row(
    specs: Mapping[str, Spec], experts: Mapping[str, Adapter], report: Callable[[str], None]
) -> dict[str, Loads]:
    """The row of arrow over these experts; none, which is reported, if their adapters differ or there is only one."""
    try:
        check_number(specs)
        check_arrow(
            {name: spec.layout for name, spec in specs.items()},
            "`fedmoe gateway export --router arrow` can leave one of them out (--leave-out {name}), or give all of "
            "them one rank (--rank) if only that differs",
        )
    except SettingsError as error:
        report(f"the row {BY_ARROW} is left out: {error}")
        return {}
    return {BY_ARROW: partial(arrow_loaded, adapters=list(experts.values()))}


def vector_row(
    store: GatewayStore,
    specs: Mapping[str, Spec],
    base: Base,
    domains: Mapping[str, Sequence[Example]],
    losses: RowLosses,
    report: Callable[[str], None],
) -> tuple[RowLosses, Routes]:
    """The row of the domain vectors, from the losses of the experts, and where it sends the rows of each domain.

    Both are empty, which is reported, if the experts lack vectors.
    """
    try:
        router = read_router(store, specs, report)
    except SettingsError as error:
        report(f"the row {BY_VECTORS} is left out: {error}")
        return {}, {}
    report("computing the hidden states of the prompts")
    states = {
        name: prompt_states(
            base.model, examples, pad_id=base.pad_id, device=base.device, autocast=base.autocast
        )
        for name, examples in domains.items()
    }
    routed, went = routed_losses(router, states, losses)
    if right := ", ".join(
        f"{name} {to[name]} of {sum(to.values())}" for name, to in went.items() if name in router.experts
    ):
        report(f"rows that the domain vectors send to their own expert: {right}")
    return {BY_VECTORS: routed}, went
