"""Held-out loss of one model on one domain, and a matrix of every adapter's loss on every domain."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fedmoe.data.encode import Example
from fedmoe.data.examples import collate
from fedmoe.model.adapter import adapter_loaded
from fedmoe.model.loss import completion_loss

BASE, MEAN = "base", "mean"  # a row and a column of the matrix
Matrix = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter's safetensors file and the content of its adapter_config.json."""

    file: bytes | memoryview
    config: Mapping[str, Any]


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    pad_id: int,
    batch_size: int,
    device: torch.device,
    autocast: torch.dtype = torch.float32,
) -> float:
    """Weighted mean cross entropy of all examples' label tokens; NaN if there are none."""
    # Rows of similar length share a batch, so that little is computed on padding.
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    total, weight = 0.0, 0.0
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size], pad_id)
        total += completion_loss(model, batch, device=device, autocast=autocast).item()
        weight += batch.weight
    return total / weight if weight else float("nan")


def evaluate(
    model: PreTrainedModel,
    adapters: Mapping[str, Adapter | None],
    domains: Mapping[str, Sequence[Example]],
    *,
    pad_id: int,
    batch_size: int,
    device: torch.device,
    autocast: torch.dtype = torch.float32,
    report: Callable[[str], None] = lambda row: None,
) -> Matrix:
    """Held-out loss of each adapter (None: the bare base model) on each domain, and its mean over them.

    Each adapter in turn is loaded onto `model`, the bare base model, and unloaded. `report` is called with a row's name
    before the row is computed; the other options are those of `mean_loss`.

    Raises:
        SpecError: if an adapter does not fit the model.
    """
    measure = partial(mean_loss, pad_id=pad_id, batch_size=batch_size, device=device, autocast=autocast)
    matrix: Matrix = {}
    for row, adapter in adapters.items():
        report(row)
        loaded = adapter_loaded(model, adapter.file, adapter.config) if adapter else nullcontext(model)
        with loaded as adapted:
            losses = {domain: measure(adapted, examples) for domain, examples in domains.items()}
        matrix[row] = losses | {MEAN: sum(losses.values()) / len(losses)}
    return matrix
