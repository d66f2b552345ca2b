"""The merge methods as one table: how each makes one pair of LoRA factors of those of all experts, in one module.

Each expert i is ΔWᵢ = sᵢ Bᵢ Aᵢ in every module, with sᵢ = alpha / rank; it began at Bᵢ = 0, so ΔWᵢ is all
that it has learned. With shares ŵᵢ = wᵢ / Σ w the gateway wanted is

    ΔW = scale · Σ ŵᵢ sᵢ Bᵢ Aᵢ

    method   rank  what comes out
    cat      Σ rᵢ  exactly ΔW: the factors side by side
    svd      any   the matrix of that rank nearest to ΔW; how far it is, is reported
    average  r     (Σ ŵᵢ Bᵢ)(Σ ŵᵢ Aᵢ): errs by Σ ŵᵢ (Bᵢ−B̄)(Aᵢ−Ā), little while the Aᵢ stay near a common start
    ties     r     small values dropped, a sign elected for each, then averaged (arXiv 2306.01708)
    dare     r     values dropped at random, the rest scaled up, then averaged (arXiv 2311.03099)

A new method is an entry of METHODS, and its name in `fedmoe.settings.METHODS`. Pure. Needs torch only; ties and dare
import peft when they are called.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """One expert in one module: A (r, n), B (m, r), share ŵᵢ, and gain = scale · sᵢ / s for B."""

    a: Tensor
    b: Tensor
    share: float
    gain: float


class Options(NamedTuple):
    """What some methods need beside the factors.

    Args:
        start: the initialisation of A (r, n) in this module, None if it is not known.
        density: the part of the values that is kept, between 0 and 1.
    """

    start: Tensor | None
    density: float


class Loss(NamedTuple):
    """The Frobenius norms of what a module's result lacks, and of the ΔW wanted."""

    lost: float
    norm: float


class Rank(Enum):
    """The rank of the result: the sum of the experts' ranks, one that may be chosen, or the one they all have."""

    SUM = "sum"
    CHOSEN = "chosen"
    COMMON = "common"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to merge.

    Args:
        rank: of the result.
        needs_init: it works on what was learned since the initialisation.
        merge: writes the factors of one module to a (r, n) and b (m, r), which are zeros; its loss if it is known.
    """

    rank: Rank
    needs_init: bool = False
    merge: Callable[[Sequence[Factors], Tensor, Tensor, Options], Loss | None]


def _stack(factors: Sequence[Factors], a: Tensor, b: Tensor, _: Options) -> Loss:
    """Write A = [A₁; A₂; …] and B = [ŵ₁B₁, ŵ₂B₂, …] straight to their place."""
    first = 0
    for part in factors:
        rows = slice(first, first + len(part.a))
        a[rows] = part.a
        torch.mul(part.b, part.share * part.gain, out=b[:, rows])
        first = rows.stop
    return Loss(0.0, 0.0)


def _average(factors: Sequence[Factors], a: Tensor, b: Tensor, _: Options) -> None:
    """Add A = Σ ŵᵢ Aᵢ and B = Σ ŵᵢ Bᵢ to zeros; as Σ ŵᵢ = 1, A keeps its part of the initialisation."""
    for part in factors:
        a.add_(part.a, alpha=part.share)
        b.add_(part.b, alpha=part.share * part.gain)


def _truncate(factors: Sequence[Factors], a: Tensor, b: Tensor, _: Options) -> Loss:
    """Write the best factors of rank len(a).

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
    return Loss(float(s[kept:].norm()), float(s.norm()))


def _ties(factors: Sequence[Factors], a: Tensor, b: Tensor, options: Options) -> None:
    """Write factors merged by peft's ties."""
    from peft.utils.merge_utils import ties

    # Its mean divides by the number of experts that agree on the sign: weights of 1 are the plain mean.
    _prune(ties, [part.share * len(factors) for part in factors], factors, a, b, options)


def _dare(factors: Sequence[Factors], a: Tensor, b: Tensor, options: Options) -> None:
    """Write factors merged by peft's dare."""
    from peft.utils.merge_utils import dare_linear

    _prune(dare_linear, [part.share for part in factors], factors, a, b, options)


def _prune(
    merger: Callable[..., Any],
    weights: Sequence[float],
    factors: Sequence[Factors],
    a: Tensor,
    b: Tensor,
    options: Options,
) -> None:
    """Merge of A what was learned since the start, and of B all."""
    w = torch.tensor(weights)
    begin = torch.zeros_like(a) if options.start is None else options.start
    torch.add(begin, merger([part.a - begin for part in factors], w, options.density), out=a)
    b.copy_(merger([part.b * part.gain for part in factors], w, options.density))


METHODS = {
    "cat": Method(rank=Rank.SUM, merge=_stack),
    "svd": Method(rank=Rank.CHOSEN, merge=_truncate),
    "average": Method(rank=Rank.COMMON, merge=_average),
    "ties": Method(rank=Rank.COMMON, needs_init=True, merge=_ties),
    "dare": Method(rank=Rank.COMMON, needs_init=True, merge=_dare),
}


def methods_of(*ranks: Rank) -> str:
    """The names of the methods whose result has such a rank, for a sentence: 'cat' or 'svd'."""
    return " or ".join(repr(name) for name, method in METHODS.items() if method.rank in ranks)
