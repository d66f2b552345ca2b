"""The base model that `fedmoe gateway serve` and `chat` load: the gateway's. Experts of another one are left out."""

from collections.abc import Callable, Mapping
from contextlib import suppress

from fedmoe.errors import BaseModelError, LostExpertError, SpecError, UnknownExpertError
from fedmoe.model.base import check_structure, load_config
from fedmoe.protocol.identity import expert_template
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.records import Meta
from fedmoe.protocol.spec import Spec
from fedmoe.settings import AnswerSettings, HeldOutSettings
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.base import Base, base_model_of, check_base_of, load
from fedmoe.tools.export import trained_gateway


def load_common(
    store: GatewayStore,
    settings: AnswerSettings,
    metas: Mapping[str, Meta],
    report: Callable[[str], None],
    *,
    wanted: str = "",
) -> Base:
    """Load the base model: the one that the settings name, else the gateway's, else that of most experts.

    Args:
        store: of the federation.
        settings: see there.
        metas: of the experts, with the trained gateway.
        report: gets a line for what is loaded.
        wanted: name of an expert that must be one of this base model, "" for none.

    Raises:
        BaseModelError: if the gateway, the wanted expert or all experts are of another base model.
        UnknownExpertError: if Redis has lost what all experts are.
    """
    specs: dict[str, Spec] = {}
    for name in metas:
        with suppress(UnknownExpertError):  # it has lost this one for now
            specs[name] = store.spec(name)
    if not specs:
        store.spec(next(iter(metas)))  # says so
    gateway = _gateway(store, specs, metas)
    base_model = settings.base_model or base_model_of(
        {name: specs[name] for name in gateway or specs}, store.experts()
    )
    config = load_config(base_model)
    needed = [gateway, {wanted} & specs.keys(), specs.keys()]

    def check(refuse: Callable[[str], None]) -> None:
        refused: dict[str, BaseModelError] = {}
        for name in specs:
            try:
                refuse(name)
            except BaseModelError as error:
                refused[name] = error
        for names in needed:
            if names and names <= refused.keys():
                raise refused[min(names)]

    check(lambda name: check_structure(config, specs[name].base_config))  # before a large model is loaded
    base = load(
        HeldOutSettings(
            data=(), base_model=base_model, device=settings.device, precision=settings.precision
        ),
        {}, {}, {}, report,
    )  # fmt: skip
    check(
        lambda name: check_base_of(
            base, name, specs[name], metas[name], expert_template(specs[name], metas[name])
        )
    )
    return base


def _gateway(store: GatewayStore, specs: Mapping[str, Spec], metas: Mapping[str, Meta]) -> set[str]:
    """The trained gateway, or the experts in the merged one: those of the gateway's base model; empty if unknown."""
    with suppress(LostExpertError, SpecError):  # another expert's base model is loaded then
        if trained_gateway(store) is not None:
            if GATEWAY in specs:
                return {GATEWAY}
        elif (merged := store.merged()) is not None:
            return {
                name
                for name in merged.by_expert or merged.experts
                if name in specs.keys() & merged.experts.keys()
                and merged.experts[name].lineage in ("", metas[name].lineage)
            }
    return set()
