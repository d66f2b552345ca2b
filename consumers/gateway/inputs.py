"""The experts as the merged gateway takes them: their values, and their weights by the settings or by a fit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from consumers.gateway.merge import MergeInput
from fedmoe.errors import SpecError
from fedmoe.protocol.fit import Fit, Weights
from fedmoe.protocol.layout import AdapterBuffer, values_of
from fedmoe.protocol.merged import BuiltFrom
from fedmoe.protocol.records import Meta
from fedmoe.protocol.spec import Spec
from fedmoe.settings import GatewaySettings
from fedmoe.store.gateway import GatewayStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the merged gateway is built of.

    Args:
        spec: of the first expert.
        experts: all listed experts, also those of weight 0.
        scale: as in `merge`.
        built_from: expert → its state, without those of gateway weight 0 and those that the fit leaves out.
        weights: expert → its weight in each group of layers, without experts of weight 0: the gateway is Σ wᵢ ΔWᵢ.
    """

    spec: Spec
    experts: list[MergeInput]
    scale: float | None
    built_from: dict[str, BuiltFrom]
    weights: Weights


Served = Callable[[str, str], AdapterBuffer | None]
TRIES = 2  # to find an expert in memory that is committed to meanwhile


def not_served(_expert: str, _commit: str) -> None:
    """No expert is in this process's memory."""


def read_inputs(
    store: GatewayStore,
    listed: Mapping[str, float],
    settings: GatewaySettings,
    fit: Fit | None,
    served: Served = not_served,
) -> Inputs:
    """Read the experts of the federation.

    Args:
        store: of the federation.
        listed: expert → its gateway weight; with 0 it is left out.
        settings: source and sum of the weights, without a fit.
        fit: of the merged gateway. It leaves out an expert that it does not name, or names with another lineage.
        served: the exact weights of an expert's weights commit, if this process has them in memory, else None.

    Raises:
        SpecError: if all weights are 0, the fit is malformed, or experts with weight are of different base models.
        UnknownExpertError: if an expert is not there, or damaged.
    """
    specs = {name: store.spec(name) for name in listed}
    metas: dict[str, Meta] = {}
    experts = []
    by_fit = fit.by_expert if fit else {}
    for name, configured in listed.items():
        metas[name], file = _read(store, name, served)
        in_groups: tuple[float, ...] = ()
        if not fit:
            weight = _weight(configured, metas[name], settings.weighting) if configured else 0.0
        else:
            in_groups = by_fit[name] if takes_part(name, configured, metas[name], fit) else ()
            weight = 1.0 if in_groups else 0.0
        experts.append(replace(as_input(specs[name], file), weight=weight, in_groups=in_groups))
    total = sum(expert.weight for expert in experts)
    if not total:
        raise SpecError(_why_nothing(listed, fit), about="gateway_weight")
    used = [name for name, expert in zip(listed, experts, strict=True) if expert.weight]
    check_one_base({name: metas[name].base_fingerprint for name in used})
    return Inputs(
        spec=specs[used[0]],
        experts=experts,
        scale=None if fit else settings.scale,
        built_from={
            name: BuiltFrom(meta.version, meta.weights_commit, meta.lineage)
            for name, meta in metas.items()
            if takes_part(name, listed[name], meta, fit)
        },
        weights={
            name: expert.in_groups if fit else (settings.scale * expert.weight / total,)
            for name, expert in zip(listed, experts, strict=True)
            if expert.weight
        },
    )


def check_one_base(prints: Mapping[str, str]) -> None:
    """Raise SpecError unless all experts have one base model; `prints`: its fingerprints, "" if not known yet."""
    known = {name: one for name, one in prints.items() if one}
    first = next(iter(known), "")
    for name, one in known.items():
        if one != known[first]:
            raise SpecError(
                f"{name} is trained on another base model than {first} (fingerprint {one}, not {known[first]}), so "
                f"they cannot be merged: leave one of them out (fedmoe expert weight {name} 0)",
                about="base_model",
            )


def _read(store: GatewayStore, name: str, served: Served) -> tuple[Meta, bytes | memoryview]:
    """Meta and exact weights of an expert: from memory if it is there, for Redis holds a snapshot and a tail."""
    for _ in range(TRIES):
        meta = store.meta(name)
        if (weights := served(name, meta.weights_commit)) is not None:
            return meta, weights.file
    return store.read(name)


def _why_nothing(listed: Mapping[str, float], fit: Fit | None) -> str:
    if not any(listed.values()):
        return (
            "every expert's gateway weight is 0, so there is nothing to merge: fedmoe expert weight EXPERT 1"
        )
    if fit:
        return (
            "the fit of the merged gateway is of none of the present experts: fit again (fedmoe gateway fit)"
        )
    return "no expert was trained yet, so all weights are 0 and there is nothing to merge"


def as_input(spec: Spec, file: bytes | memoryview) -> MergeInput:
    """An expert of weight 1 from its safetensors file."""
    return MergeInput(
        layout=spec.layout, flat=values_of(spec.layout, file), scaling=spec.lora.scaling, weight=1.0
    )


def takes_part(name: str, configured: float, meta: Meta, fit: Fit | None) -> bool:
    """True if the merged gateway takes this expert: its weight is not 0, and the fit, if there is one, has it."""
    return bool(configured) and (fit is None or (is_fitted(fit, name, meta) and any(fit.by_expert[name])))


def is_fitted(fit: Fit, name: str, meta: Meta) -> bool:
    """True if the fit is of this expert; an expert that was removed and created again counts as another expert."""
    known = fit.experts.get(name)
    return name in fit.by_expert and known is not None and known.lineage == meta.lineage


def _weight(configured: float, meta: Meta, weighting: str) -> float:
    match weighting:
        case "examples":
            return float(meta.n_examples)
        case "updates":
            return float(meta.version)
    return configured
