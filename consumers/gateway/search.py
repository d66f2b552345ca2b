"""Searches the weights of the merged gateway that have the lowest loss on some rows.

The loss of ΔW = Σ wᵢ ΔWᵢ is a smooth function of a few weights, and one backward pass gives its gradient: the factors
of all experts lie side by side in one adapter, as `cat` merges them, and the rows of A x that belong to an expert are
multiplied by its weight. From the best of some fixed scales, L-BFGS with a line search lowers the loss over all rows
at once, so that the same rows give the same weights, which are never worse than where it began, nor than the weights
in force. A weight is the square of a free number, so none is below 0.

Sources: LoRAHub (arXiv 2307.13269) fits one weight for each adapter on a few rows, without derivatives; AdaMerging
(arXiv 2310.02575) learns weights for each task vector, or each of its layers, by gradient.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from consumers.gateway.merge import Merged, MergeInput, lora_dims, merge
from fedmoe.data.encode import Example
from fedmoe.data.examples import Batch, collate
from fedmoe.errors import DataError, SettingsError
from fedmoe.model.adapter import adapter_loaded
from fedmoe.model.loss import completion_loss
from fedmoe.protocol.fit import Weights, groups_of
from fedmoe.protocol.spec import Spec
from fedmoe.tools.base import Base
from fedmoe.tools.evaluate import BASE

SCALES = (1.0, 1.4, 1.8, 2.4)  # of equal weights; the search begins at the best of them
CHANGE = 1e-4  # nats, or of a weight's root: the search ends when a step changes less
PRESENT = "present weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The result of a search.

    Args:
        weights: expert → its weight in each group of layers.
        loss: with them, the mean over the domains (nats per answer token).
        before: what was measured before the search → its loss.
        passes: over the rows, with and without gradient.
    """

    weights: Weights
    loss: float
    before: dict[str, float]
    passes: int


def side_by_side(experts: Iterable[MergeInput]) -> Merged:
    """All experts in one adapter, each with weight 1."""
    return merge([replace(expert, weight=1.0, in_groups=()) for expert in experts], scale=None)


@contextmanager
def loaded(base: Base, experts: Mapping[str, MergeInput], spec: Spec) -> Iterator[nn.Module]:
    """Put all experts side by side on the model for the duration of the context; `spec` is that of the first."""
    stacked = side_by_side(experts.values())
    config = spec.adapter_config(rank=stacked.rank) | {"lora_alpha": stacked.scaling * stacked.rank}
    with adapter_loaded(base.model, stacked.buffer.file, config) as model:
        yield model.requires_grad_(False)


class _TooFarError(Exception):
    """A step led to weights whose loss is not finite: the search ends with the best so far."""


class Objective:
    """The loss as a function of the weights (groups of layers, experts), mean over the domains; a context.

    Args:
        model: with the experts side by side as the active adapter of this name.
        experts: by name, in the order in which they stand there.
        domains: domain → examples, none of them empty.
        pad_id, batch_size, device, autocast: as in `mean_loss`.
        report: called with a line for each pass over the rows.
    """

    def __init__(
        self, model: nn.Module, experts: Mapping[str, MergeInput], domains: Mapping[str, Sequence[Example]], *,
        pad_id: int, batch_size: int, device: torch.device, autocast: torch.dtype,
        report: Callable[[str], None], adapter: str = "default",
    ) -> None:  # fmt: skip
        self.names = list(experts)
        self.device = device
        self.passes = 0
        self._model, self._autocast, self._report = model, autocast, report
        self._domains = [_batches(examples, pad_id, batch_size) for examples in domains.values()]
        self._ranks = torch.tensor([lora_dims(one.layout)[1] for one in experts.values()], device=device)
        ending = f".lora_A.{adapter}"
        self._factors = {
            name.removesuffix(ending): module
            for name, module in model.named_modules()
            if name.endswith(ending)
        }
        self._weights: dict[str, Tensor] = {}  # module → weight of each row of A x

    def __enter__(self) -> Self:
        self._hooks = [
            module.register_forward_hook(self._weigher(name)) for name, module in self._factors.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def __call__(self, weights: Tensor) -> float:
        """The loss of these weights, maybe not finite; if they require a gradient, it goes to that of their leaves."""
        self.passes += 1
        free = weights.detach().requires_grad_(weights.requires_grad)
        total = 0.0
        with torch.set_grad_enabled(weights.requires_grad):
            for batches in self._domains:
                share = 1 / (len(self._domains) * sum(batch.weight for batch in batches))
                for batch in batches:
                    self._weigh(free)
                    loss = share * completion_loss(
                        self._model, batch, device=self.device, autocast=self._autocast
                    )
                    if weights.requires_grad:
                        torch.autograd.backward(loss)
                    total += loss.item()
        self._report(f"pass {self.passes} over the rows: loss {total:.4f}")
        if free.grad is not None:
            torch.autograd.backward(weights, free.grad)
        return total

    def count_groups(self, n_groups: int) -> int:
        """How many of so many groups of layers have a layer."""
        return len(set(groups_of(self._factors, n_groups).values()))

    def _weigh(self, weights: Tensor) -> None:
        rows = weights.repeat_interleave(self._ranks, dim=1)
        groups = groups_of(self._factors, len(weights))
        self._weights = {name: rows[group] for name, group in groups.items()}

    def _weigher(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda _, __, hidden: hidden * self._weights[name]


def search(objective: Objective, *, n_groups: int, max_passes: int, present: Weights) -> Found:
    """Find the weights of the lowest loss.

    Args:
        objective: to lower.
        n_groups: groups of layers that have weights of their own.
        max_passes: over the rows, with gradient.
        present: the weights in force, measured too if they are of these experts.

    Raises:
        DataError: if no fixed scale, or not even the base model, has a finite loss.
        SettingsError: if there are more groups than layers.
    """
    if (layers := objective.count_groups(n_groups)) < n_groups:
        raise SettingsError(
            f"--layer-groups {n_groups} is more than the experts have layers, {layers}: give {layers} or less",
            about="layer_groups",
        )
    names, device = objective.names, objective.device

    def equal(scale: float) -> Tensor:
        return torch.full((n_groups, len(names)), scale / len(names), device=device)

    starts = {f"scale {scale:g}": equal(scale) for scale in SCALES}
    measured = {BASE: objective(equal(0.0))}
    measured |= {name: objective(weights) for name, weights in starts.items()}
    now: Weights = {}
    if present and present.keys() <= set(names):
        groups = len(next(iter(present.values())))
        now = {name: present.get(name, (0.0,) * groups) for name in names}
        table = torch.tensor(list(now.values()), device=device).T.contiguous()
        measured[PRESENT] = objective(table)
        if groups in (1, n_groups) and table.all():  # the search cannot leave a weight of 0
            starts[PRESENT] = table.expand(n_groups, -1).contiguous()
    before = {name: loss for name, loss in measured.items() if math.isfinite(loss)}
    if BASE not in before or not starts.keys() & before.keys():
        raise DataError(
            "the loss on these rows is not a number, so nothing was fitted: `fedmoe evaluate` with the same rows shows "
            "which model has it",
            about="loss",
        )
    start = min(starts.keys() & before.keys(), key=before.__getitem__)
    best = starts[start], before[start]
    free = best[0].sqrt().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [free],
        max_iter=max_passes,
        max_eval=max_passes,
        tolerance_change=CHANGE,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        nonlocal best
        optimizer.zero_grad()
        weights = free.square()
        loss = objective(weights)
        if not math.isfinite(loss):
            raise _TooFarError
        if loss < best[1]:
            best = weights.detach().clone(), loss
        return loss

    with suppress(_TooFarError):
        optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch's
    weights, loss = best
    found: Weights = {name: tuple(column) for name, column in zip(names, weights.T.tolist(), strict=True)}
    # Where the search could not begin at the weights in force, they stay if they are better.
    if before.get(PRESENT, math.inf) < loss:
        found, loss = now, before[PRESENT]
    return Found(
        weights=found,
        loss=loss,
        before=before,
        passes=objective.passes,
    )


def _batches(examples: Sequence[Example], pad_id: int, size: int) -> list[Batch]:
    """Batches of rows of similar length, so that little is computed on padding."""
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    return [collate(ordered[start : start + size], pad_id) for start in range(0, len(ordered), size)]
