"""Held-out loss of one model on one domain, and a matrix of every adapter's loss on every domain."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fedmoe.data.encode import Example
from fedmoe.data.examples import collate
from fedmoe.model.adapter import adapter_loaded
from fedmoe.model.loss import losses_of_rows

BASE, MEAN = "base", "mean"  # a row and a column of the matrix
Matrix = dict[str, dict[str, float]]


Loads = Callable[[PreTrainedModel], AbstractContextManager[nn.Module]]  # puts adapters on the bare base model


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter's safetensors file and the content of its adapter_config.json."""

    file: bytes | memoryview
    config: Mapping[str, Any]

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[nn.Module]:
        """The model with this adapter, for the duration of the context; see `adapter_loaded`."""
        return adapter_loaded(model, self.file, self.config)


@torch.no_grad()
def row_losses(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    pad_id: int,
    batch_size: int,
    device: torch.device,
    autocast: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weighted sum of the cross entropy of each example's label tokens, (n,) fp64, in the order of the examples."""
    # Rows of similar length share a batch, so that little is computed on padding.
    ordered = sorted(range(len(examples)), key=lambda place: len(examples[place].input_ids))
    losses = torch.zeros(len(examples), dtype=torch.float64)
    for start in range(0, len(ordered), batch_size):
        places = ordered[start : start + batch_size]
        batch = collate([examples[place] for place in places], pad_id)
        losses[places] = losses_of_rows(model, batch, device=device, autocast=autocast).double()
    return losses


def mean_of_rows(losses: torch.Tensor, examples: Sequence[Example]) -> float:
    """The weighted mean cross entropy of all label tokens, of what `row_losses` gave; NaN if there are none."""
    weight = sum((one.stop - one.start) * one.weight for example in examples for one in example.answers)
    return float(losses.sum()) / weight if weight else float("nan")


def mean_loss(model: nn.Module, examples: Sequence[Example], **options: Any) -> float:
    """Weighted mean cross entropy of all label tokens; NaN if there are none. `options` are those of `row_losses`."""
    return mean_of_rows(row_losses(model, examples, **options), examples)


RowLosses = dict[str, dict[str, torch.Tensor]]  # row of the matrix -> domain -> what `row_losses` gives


def evaluate_rows(
    model: PreTrainedModel,
    adapters: Mapping[str, Loads | None],
    domains: Mapping[str, Sequence[Example]],
    *,
    report: Callable[[str], None] = lambda row: None,
    **options: Any,
) -> RowLosses:
    """The loss of each row of the matrix on each example of each domain; the arguments are those of `evaluate`."""
    found: RowLosses = {}
    for row, loads in adapters.items():
        report(row)
        with loads(model) if loads else nullcontext(model) as adapted:
            found[row] = {
                name: row_losses(adapted, examples, **options) for name, examples in domains.items()
            }
    return found


def matrix_of(losses: RowLosses, domains: Mapping[str, Sequence[Example]]) -> Matrix:
    """The mean loss of each row of the matrix on each domain, and its mean over them."""
    matrix: Matrix = {}
    for row, by_domain in losses.items():
        means = {name: mean_of_rows(by_domain[name], examples) for name, examples in domains.items()}
        matrix[row] = means | {MEAN: sum(means.values()) / len(means)}
    return matrix


def evaluate(
    model: PreTrainedModel,
    adapters: Mapping[str, Loads | None],
    domains: Mapping[str, Sequence[Example]],
    **options: Any,
) -> Matrix:
    """Held-out loss of each adapter (None: the bare base model) on each domain, and its mean over them.

    Each adapter in turn is loaded onto `model`, the bare base model, and unloaded. `options`: `report` is called with a
    row's name before the row is computed; the others are those of `row_losses`.

    Raises:
        SpecError: if an adapter does not fit the model.
    """
    return matrix_of(evaluate_rows(model, adapters, domains, **options), domains)
