"""The merge methods as one table: each merges the experts' LoRA factors of one module into one pair of factors.

Expert i is ΔWᵢ = sᵢ Bᵢ Aᵢ in every module, with sᵢ = alpha / rank; training started at Bᵢ = 0, so ΔWᵢ is everything
that the expert learned. With shares ŵᵢ = wᵢ / Σ w, the ideal gateway is

    ΔW = scale · Σ ŵᵢ sᵢ Bᵢ Aᵢ

    method   rank  result
    cat      Σ rᵢ  exactly ΔW: the factors side by side
    svd      any   the matrix of that rank nearest to ΔW; its distance is reported
    average  r     (Σ ŵᵢ Bᵢ)(Σ ŵᵢ Aᵢ): error Σ ŵᵢ (Bᵢ−B̄)(Aᵢ−Ā), small while the Aᵢ stay near a common start
    ties     r     small values dropped, one sign elected per value, then averaged (arXiv 2306.01708)
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
    """Further inputs of some methods.

    Args:
        start: the initialisation of A (r, n) in this module, None if unknown.
        density: fraction of the values that is kept, between 0 and 1.
    """

    start: Tensor | None
    density: float


class Loss(NamedTuple):
    """Frobenius norms of a module's error (`lost`) and of the ideal ΔW (`norm`)."""

    lost: float
    norm: float


class Rank(Enum):
    """The rank of the result: the sum of the experts' ranks, a chosen one, or their common rank."""

    SUM = "sum"
    CHOSEN = "chosen"
    COMMON = "common"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to merge.

    Args:
        rank: of the result.
        needs_init: it merges the difference to the initialisation.
        merge: writes the factors of one module to a (r, n) and b (m, r), which are zeros; returns its loss if it has
            computed that anyway (else `loss_of` does).
    """

    rank: Rank
    needs_init: bool = False
    merge: Callable[[Sequence[Factors], Tensor, Tensor, Options], Loss | None]

    @property
    def can_choose_rank(self) -> bool:
        """True if the rank of the result is a choice."""
        return self.rank is Rank.CHOSEN


def _stack(factors: Sequence[Factors], a: Tensor, b: Tensor, _: Options) -> Loss:
    """Write A = [A₁; A₂; …] and B = [ŵ₁B₁, ŵ₂B₂, …] (B scaled by the gains)."""
    first = 0
    for part in factors:
        rows = slice(first, first + len(part.a))
        a[rows] = part.a
        torch.mul(part.b, part.share * part.gain, out=b[:, rows])
        first = rows.stop
    return Loss(0.0, 0.0)


def _average(factors: Sequence[Factors], a: Tensor, b: Tensor, _: Options) -> None:
    """Write A = Σ ŵᵢ Aᵢ and B = Σ ŵᵢ Bᵢ (B scaled by the gains); as Σ ŵᵢ = 1, A keeps the initialisation."""
    for part in factors:
        a.add_(part.a, alpha=part.share)
        b.add_(part.b, alpha=part.share * part.gain)


def _truncate(factors: Sequence[Factors], a: Tensor, b: Tensor, _: Options) -> Loss:
    """Write the factors of rank len(a) nearest to ΔW.

    ΔW = Q_B (R_B R_Aᵀ) Q_Aᵀ: the core, at most Σr × Σr, has the singular values of ΔW, which is never formed. Each
    factor gets the square roots of the singular values; if ΔW has a lower rank than len(a), zeros stay.
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

    # ties divides by the number of experts that agree on the sign: with weights of 1 it gives the plain mean.
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
    """Merge the differences of A to its initialisation, and the whole B."""
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


def loss_of(factors: Sequence[Factors], a: Tensor, b: Tensor) -> Loss:
    """The loss of a merged module a (r, n), b (m, r).

    With the factors side by side, ΔW − b a is one product of rank Σr + r; QR of both sides gives its norm without
    forming a matrix (m, n).
    """
    left, right = [part.b * (part.share * part.gain) for part in factors], [part.a for part in factors]
    return Loss(_norm([*left, -b], [*right, a]), _norm(left, right))


def _norm(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """‖Σ left · right‖."""
    r_left = torch.linalg.qr(torch.cat(list(left), dim=1), mode="r").R
    r_right = torch.linalg.qr(torch.cat(list(right)).T, mode="r").R
    return float((r_left @ r_right.T).norm())


def methods_of(*ranks: Rank) -> str:
    """The names of the methods with these kinds of rank, for a sentence: 'cat' or 'svd'."""
    return " or ".join(repr(name) for name, method in METHODS.items() if method.rank in ranks)
