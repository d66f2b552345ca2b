"""The gateway's arithmetic: several LoRA experts of one base model become one LoRA adapter.

`consumers.gateway.methods` defines how each method merges one module; this file checks the experts, lays out the result
and merges every module. Pure: the same experts give the same bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consumers.gateway.methods import METHODS, Factors, Loss, Options, Rank, loss_of, methods_of
from fedmoe.errors import SettingsError, SpecError
from fedmoe.protocol.fit import groups_of
from fedmoe.protocol.layout import AdapterBuffer, Layout

MAX_MERGED_BYTES = 16 * 2**30  # `cat` of 19 adapters of a 70B model
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"

Dims = dict[str, tuple[int, int]]  # module -> features (out, in)


@dataclass(frozen=True, kw_only=True)
class MergeInput:
    """One adapter to merge: values `flat` (numel,) fp32, `scaling` alpha / rank, gateway weight.

    `in_groups` holds factors of the weight in each group of layers, the same number for all experts; none means 1.
    """

    layout: Layout
    flat: Tensor
    scaling: float
    weight: float
    in_groups: tuple[float, ...] = ()

    def weight_in(self, group: int) -> float:
        """The weight in one group of layers."""
        return self.weight * self.in_groups[group] if self.in_groups else self.weight


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A merged adapter; `buffer.file` is its safetensors file.

    Args:
        rank: of every module.
        scaling: alpha / rank of the first expert with weight; another expert's scaling is multiplied into its B.
        relative_error: ‖ΔW − result‖ / ‖ΔW‖ (Frobenius, all modules together); 0 if the method is exact, or ΔW is 0.
    """

    buffer: AdapterBuffer
    rank: int
    scaling: float
    relative_error: float

    @property
    def layout(self) -> Layout:
        """Names and shapes of its tensors."""
        return self.buffer.layout

    @property
    def flat(self) -> Tensor:
        """Its values (numel,) fp32."""
        return self.buffer.flat


def merge(
    experts: Sequence[MergeInput],
    *,
    method: str = "cat",
    scale: float | None = 1.0,
    rank: int | None = None,
    init: Tensor | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> Merged:
    """Merge experts of one base model; those of weight 0 are left out.

    Args:
        experts: one or more; their ranks may differ for cat and svd.
        method: one of METHODS.
        scale: factor of the weighted mean; 1 gives the mean, None the sum Σ wᵢ ΔWᵢ.
        rank: of svd's result; the largest of the experts' ranks by default.
        init: the shared initialisation (numel,) fp32; some methods merge the difference to it, and use A = 0 as
            initialisation if it is None.
        density: fraction of the values that ties and dare keep, between 0 and 1.
        seed: of dare's random choice.

    Raises:
        SettingsError: if a setting or a weight is invalid.
        SpecError: if the experts cannot be merged with each other.
    """
    _check_settings(experts, method, scale, rank, density)
    experts = [expert for expert in experts if expert.weight > 0]
    dims, ranks = _check_experts(experts)
    rank = _result_rank(method, ranks, rank)
    layout = _lora_layout(dims, rank)
    if layout.file_bytes > MAX_MERGED_BYTES:
        raise SettingsError(
            f"the merged adapter would have {layout.file_bytes / 2**30:.0f} GiB, allowed are "
            f"{MAX_MERGED_BYTES / 2**30:.0f}: use {methods_of(Rank.CHOSEN)}",
            about="length",
        )
    buffer = AdapterBuffer(layout)
    target = layout.views(buffer.flat)
    views = [expert.layout.views(expert.flat) for expert in experts]
    start = experts[0].layout.views(init) if init is not None else {}
    scaling = experts[0].scaling
    groups = groups_of(dims, len(experts[0].in_groups) or 1)
    losses: list[Loss] = []
    # peft draws from torch's global generator: it is seeded here and restored afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in dims:
            name_a, name_b = module + LORA_A, module + LORA_B
            weights = [expert.weight_in(groups[module]) for expert in experts]
            if not (total := sum(weights)):
                continue  # the factors stay 0
            gain = total if scale is None else scale
            factors = [
                Factors(view[name_a], view[name_b], weight / total, gain * expert.scaling / scaling)
                for view, expert, weight in zip(views, experts, weights, strict=True)
            ]
            options = Options(start.get(name_a), density)
            known = METHODS[method].merge(factors, target[name_a], target[name_b], options)
            losses.append(known or loss_of(factors, target[name_a], target[name_b]))
    return Merged(buffer=buffer, rank=rank, scaling=scaling, relative_error=_relative_error(losses))


def _relative_error(losses: Sequence[Loss]) -> float:
    """The relative error over all modules."""
    norm = math.hypot(*(loss.norm for loss in losses))
    return math.hypot(*(loss.lost for loss in losses)) / norm if norm else 0.0


def _result_rank(method: str, ranks: list[int], rank: int | None) -> int:
    match METHODS[method].rank:
        case Rank.SUM:
            return sum(ranks)
        case Rank.CHOSEN:
            return rank or max(ranks)
        case Rank.COMMON:
            if len(set(ranks)) > 1:
                raise SpecError(
                    f"{method} needs experts of one rank, these have {ranks}: use {methods_of(Rank.SUM, Rank.CHOSEN)}",
                    about="rank",
                )
            return ranks[0]


def _check_settings(
    experts: Sequence[MergeInput], method: str, scale: float | None, rank: int | None, density: float
) -> None:
    if method not in METHODS:
        raise SettingsError(
            f"merge method must be one of {', '.join(METHODS)}, not {method!r}", about="method"
        )
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise SettingsError(f"the gateway's scale must be a number above 0, not {scale!r}", about="scale")
    if rank is not None and (METHODS[method].rank is not Rank.CHOSEN or rank < 1):
        raise SettingsError(
            f"a rank, of at least 1, can be chosen for {methods_of(Rank.CHOSEN)} only; got {rank!r} for {method!r}",
            about="rank",
        )
    if not 0 < density < 1:
        raise SettingsError(f"density must be between 0 and 1, not {density!r}", about="density")
    if not experts:
        raise SettingsError("there is no expert to merge", about="experts")
    weights = [expert.weight for expert in experts]
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise SettingsError(
            f"an expert's weight must be a number of at least 0; these are {weights}", about="weights"
        )
    if not 0 < sum(weights) < math.inf:
        raise SettingsError(
            f"the experts' weights must add up to a number above 0; these are {weights}", about="sum"
        )


def _check_experts(experts: Sequence[MergeInput]) -> tuple[Dims, list[int]]:
    """Check that the experts can be merged; returns their common modules, and the experts' ranks."""
    dims, _ = lora_dims(experts[0].layout)
    ranks = []
    for index, expert in enumerate(experts):
        own, rank = lora_dims(expert.layout)
        if own != dims:
            odd = min(module for module in own.keys() | dims.keys() if own.get(module) != dims.get(module))
            raise SpecError(
                f"module {odd!r} is {dims.get(odd)} in the first expert, "
                f"{own.get(odd)} in number {index + 1}: "
                "only experts of one base model and the same LoRA targets can be merged",
                about="modules",
            )
        if not (math.isfinite(expert.scaling) and expert.scaling > 0):
            raise SpecError(
                f"expert number {index + 1} has the impossible scaling {expert.scaling!r}", about="scaling"
            )
        if not expert.flat.norm().isfinite():
            raise SpecError(f"expert number {index + 1} holds values that are not finite", about="values")
        ranks.append(rank)
    return dims, ranks


def lora_dims(layout: Layout) -> tuple[Dims, int]:
    """The modules of a LoRA layout and their common rank."""
    shapes = dict(layout.tensors)
    dims: Dims = {}
    ranks = set()
    for module in dict.fromkeys(name.removesuffix(LORA_A).removesuffix(LORA_B) for name in shapes):
        match shapes.get(module + LORA_A), shapes.get(module + LORA_B):
            case (rank, n), (m, same) if rank == same:
                dims[module] = (m, n)
                ranks.add(rank)
            case _:
                raise SpecError(
                    f"{module!r} is not a pair of LoRA factors, A (rank, in) and B (out, rank)",
                    about="factors",
                )
    if len(ranks) > 1:
        raise SpecError(
            f"the modules of one expert have different ranks, {sorted(ranks)}: that cannot be merged",
            about="rank",
        )
    return dims, ranks.pop()


def _lora_layout(dims: Dims, rank: int) -> Layout:
    factors = [(module + LORA_A, (rank, n)) for module, (_, n) in dims.items()]
    factors += [(module + LORA_B, (m, rank)) for module, (m, _) in dims.items()]
    return Layout.of(factors)
