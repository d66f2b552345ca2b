"""The gateway's arithmetic: several LoRA experts of one base model become one LoRA adapter.

Each expert i is ΔWᵢ = sᵢ Bᵢ Aᵢ in every module, with sᵢ = alpha / rank; it began at Bᵢ = 0, so ΔWᵢ is all
that it has learned. With shares ŵᵢ = wᵢ / Σ w the gateway wanted is

    ΔW = scale · Σ ŵᵢ sᵢ Bᵢ Aᵢ

    method   rank  what comes out
    cat      Σ rᵢ  exactly ΔW: the factors side by side
    svd      any   the matrix of that rank nearest to ΔW; how far it is, is reported
    average  r     (Σ ŵᵢ Bᵢ)(Σ ŵᵢ Aᵢ): errs by Σ ŵᵢ (Bᵢ−B̄)(Aᵢ−Ā), little while the Aᵢ stay near a common start
    ties     r     small values dropped, a sign elected for each, then averaged (arXiv 2306.01708)
    dare     r     values dropped at random, the rest scaled up, then averaged (arXiv 2311.03099)

Pure: the same experts give the same bytes. Needs torch only; ties and dare import peft when they are called.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedmoe.errors import SettingsError, SpecError
from fedmoe.protocol.layout import MAX_STRING_BYTES, AdapterBuffer, Layout

METHODS = ("cat", "svd", "average", "ties", "dare")
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"

Dims = dict[str, tuple[int, int]]  # module -> features (out, in)


@dataclass(frozen=True, kw_only=True)
class MergeInput:
    """One adapter to merge: its values `flat` (numel,) fp32, its alpha / rank, its weight in the gateway."""

    layout: Layout
    flat: Tensor
    scaling: float
    weight: float


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A merged adapter; `buffer.file` is its safetensors file.

    Args:
        rank: of every module.
        scaling: alpha / rank; that of the first expert with weight, another's is folded into its B.
        relative_error: ‖ΔW − result‖ / ‖ΔW‖ (Frobenius, all modules together): 0 for cat, what was truncated
            for svd, None where it is not known.
    """

    buffer: AdapterBuffer
    rank: int
    scaling: float
    relative_error: float | None

    @property
    def layout(self) -> Layout:
        """Names and shapes of its tensors."""
        return self.buffer.layout

    @property
    def flat(self) -> Tensor:
        """Its values (numel,) fp32."""
        return self.buffer.flat


class _Factors(NamedTuple):
    """One expert in one module: A (r, n), B (m, r), share ŵᵢ, and gain = scale · sᵢ / s for B."""

    a: Tensor
    b: Tensor
    share: float
    gain: float


def merge(
    experts: Sequence[MergeInput],
    *,
    method: str = "cat",
    scale: float = 1.0,
    rank: int | None = None,
    init: Tensor | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> Merged:
    """Merge experts of one base model; those of weight 0 are left out.

    Args:
        experts: one or more; their ranks may differ for cat and svd.
        method: one of METHODS.
        scale: in front of the weighted mean; 1 is the mean.
        rank: of svd's result; the largest of the experts' ranks by default.
        init: the initialisation (numel,) fp32 that the experts share; ties and dare work on what was learned
            since, and without it take that of A for 0.
        density: the part of the values that ties and dare keep, between 0 and 1.
        seed: of dare's random choice.

    Raises:
        SettingsError: for a setting or a weight that cannot be used.
        SpecError: if the experts do not fit together.
    """
    _check_settings(experts, method, scale, rank, density)
    experts = [expert for expert in experts if expert.weight > 0]
    dims, ranks = _check_experts(experts)
    rank = _result_rank(method, ranks, rank)
    layout = _lora_layout(dims, rank)
    if layout.file_bytes > MAX_STRING_BYTES:
        raise SettingsError(
            f"the merged adapter would have {layout.file_bytes / 2**20:.0f} MiB, allowed are 512: use 'svd'"
        )
    buffer = AdapterBuffer(layout)
    target = layout.views(buffer.flat)
    views = [expert.layout.views(expert.flat) for expert in experts]
    start = experts[0].layout.views(init) if init is not None else {}
    total, scaling = sum(expert.weight for expert in experts), experts[0].scaling
    lost = norm = 0.0
    # peft draws from torch's own generator: it is seeded here and afterwards given back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in dims:
            name_a, name_b = module + LORA_A, module + LORA_B
            factors = [
                _Factors(view[name_a], view[name_b], expert.weight / total, scale * expert.scaling / scaling)
                for view, expert in zip(views, experts, strict=True)
            ]
            a, b = target[name_a], target[name_b]
            if method == "cat":
                _stack(factors, a, b)
            elif method == "average":
                _average(factors, a, b)
            elif method == "svd":
                module_lost, module_norm = _truncate(factors, a, b)
                lost, norm = math.hypot(lost, module_lost), math.hypot(norm, module_norm)
            else:
                _prune(factors, a, b, method, density, start.get(name_a))
    known = {"cat": 0.0, "svd": lost / norm if norm else 0.0}
    return Merged(buffer=buffer, rank=rank, scaling=scaling, relative_error=known.get(method))


def _stack(factors: list[_Factors], a: Tensor, b: Tensor) -> None:
    """Write A = [A₁; A₂; …] and B = [ŵ₁B₁, ŵ₂B₂, …] straight to their place."""
    first = 0
    for part in factors:
        rows = slice(first, first + len(part.a))
        a[rows] = part.a
        torch.mul(part.b, part.share * part.gain, out=b[:, rows])
        first = rows.stop


def _average(factors: list[_Factors], a: Tensor, b: Tensor) -> None:
    """Add A = Σ ŵᵢ Aᵢ and B = Σ ŵᵢ Bᵢ to zeros; as Σ ŵᵢ = 1, A keeps its part of the initialisation."""
    for part in factors:
        a.add_(part.a, alpha=part.share)
        b.add_(part.b, alpha=part.share * part.gain)


def _truncate(factors: list[_Factors], a: Tensor, b: Tensor) -> tuple[float, float]:
    """Write the best factors of rank len(a); return the norm of what was truncated, and that of the whole.

    ΔW = Q_B (R_B R_Aᵀ) Q_Aᵀ: the singular values of the core, at most Σr × Σr, are those of ΔW, which is not
    formed. Each factor gets their square roots; where ΔW has a lower rank than a has rows, zeros stay.
    Source: FLoRIST, arXiv 2506.09199.
    """
    q_b, r_b = torch.linalg.qr(torch.cat([part.b * (part.share * part.gain) for part in factors], dim=1))
    q_a, r_a = torch.linalg.qr(torch.cat([part.a for part in factors]).T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = min(len(a), len(s))
    root = s[:kept].sqrt()
    b[:, :kept] = q_b @ (u[:, :kept] * root)
    a[:kept] = (root.unsqueeze(1) * vh[:kept]) @ q_a.T
    return float(s[kept:].norm()), float(s.norm())


def _prune(
    factors: list[_Factors], a: Tensor, b: Tensor, method: str, density: float, start: Tensor | None
) -> None:
    """Write factors merged by peft's ties or dare: of A what was learned since `start` (r, n), of B all."""
    from peft.utils import merge_utils

    weights = torch.tensor([part.share for part in factors])
    if method == "ties":
        # Its mean divides by the number of experts that agree on the sign: weights of 1 are the plain mean.
        merger, weights = merge_utils.ties, weights * len(factors)
    else:
        merger = merge_utils.dare_linear
    begin = torch.zeros_like(a) if start is None else start
    torch.add(begin, merger([part.a - begin for part in factors], weights, density), out=a)
    b.copy_(merger([part.b * part.gain for part in factors], weights, density))


def _result_rank(method: str, ranks: list[int], rank: int | None) -> int:
    if method == "cat":
        return sum(ranks)
    if method == "svd":
        return rank or max(ranks)
    if len(set(ranks)) > 1:
        raise SpecError(f"{method} needs experts of one rank, these have {ranks}: use 'cat' or 'svd'")
    return ranks[0]


def _check_settings(
    experts: Sequence[MergeInput], method: str, scale: float, rank: int | None, density: float
) -> None:
    if method not in METHODS:
        raise SettingsError(f"merge method must be one of {', '.join(METHODS)}, not {method!r}")
    if not (math.isfinite(scale) and scale > 0):
        raise SettingsError(f"the gateway's scale must be a number above 0, not {scale!r}")
    if rank is not None and (method != "svd" or rank < 1):
        raise SettingsError(
            f"a rank, of at least 1, can be chosen for 'svd' only; got {rank!r} for {method!r}"
        )
    if not 0 < density < 1:
        raise SettingsError(f"density must be between 0 and 1, not {density!r}")
    if not experts:
        raise SettingsError("there is no expert to merge")
    weights = [expert.weight for expert in experts]
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise SettingsError(f"an expert's weight must be a number of at least 0; these are {weights}")
    if not 0 < sum(weights) < math.inf:
        raise SettingsError(f"the experts' weights must add up to a number above 0; these are {weights}")


def _check_experts(experts: Sequence[MergeInput]) -> tuple[Dims, list[int]]:
    """The modules that all experts share, and the experts' ranks."""
    dims, _ = _lora_dims(experts[0].layout)
    ranks = []
    for index, expert in enumerate(experts):
        own, rank = _lora_dims(expert.layout)
        if own != dims:
            odd = min(module for module in own.keys() | dims.keys() if own.get(module) != dims.get(module))
            raise SpecError(
                f"module {odd!r} is {dims.get(odd)} in the first expert, "
                f"{own.get(odd)} in number {index + 1}: "
                "only experts of one base model and the same LoRA targets can be merged"
            )
        if not (math.isfinite(expert.scaling) and expert.scaling > 0):
            raise SpecError(f"expert number {index + 1} has the impossible scaling {expert.scaling!r}")
        if not expert.flat.norm().isfinite():
            raise SpecError(f"expert number {index + 1} holds values that are not finite")
        ranks.append(rank)
    return dims, ranks


def _lora_dims(layout: Layout) -> tuple[Dims, int]:
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
                raise SpecError(f"{module!r} is not a pair of LoRA factors, A (rank, in) and B (out, rank)")
    if len(ranks) > 1:
        raise SpecError(
            f"the modules of one expert have different ranks, {sorted(ranks)}: that cannot be merged"
        )
    return dims, ranks.pop()


def _lora_layout(dims: Dims, rank: int) -> Layout:
    factors = [(module + LORA_A, (rank, n)) for module, (_, n) in dims.items()]
    factors += [(module + LORA_B, (m, rank)) for module, (m, _) in dims.items()]
    return Layout.of(factors)
