"""The loss of training and evaluation: next-token cross entropy on the answers only."""

import inspect

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F

from fedmoe.data.examples import NO_LABEL, Batch


def completion_loss(
    model: nn.Module, batch: Batch, *, device: torch.device, autocast: torch.dtype
) -> torch.Tensor:
    """Weighted sum (not mean) of the cross entropy of the batch's label tokens: an fp32 scalar on the device.

    `model` is a causal LM, with or without peft; `batch` is on the CPU; with float32 as `autocast` there is no
    autocast. If the model supports it, logits are computed only from the column before the first label on: with a
    vocabulary of 150,000 they take much of a step's time and most of its memory.
    """
    return _losses(model, batch, device, autocast)[0].sum()


def losses_of_rows(
    model: nn.Module, batch: Batch, *, device: torch.device, autocast: torch.dtype
) -> torch.Tensor:
    """The part of `completion_loss` that each of the batch's `b` examples has: (b,) fp32 on the CPU."""
    losses, counted = _losses(model, batch, device, autocast)
    rows = counted.nonzero()[:, 0]
    return torch.zeros(len(counted), device=rows.device).index_add_(0, rows, losses).cpu()


def _losses(
    model: nn.Module, batch: Batch, device: torch.device, autocast: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted cross entropies (t,) of all label tokens, and where these are: (b, columns - 1) bool."""
    columns = batch.input_ids.shape[1] - batch.first_label + 1
    options = {"logits_to_keep": columns} if _can_keep_logits(model) else {}
    with torch.autocast(device.type, autocast, enabled=autocast != torch.float32):
        logits = model(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            use_cache=False,
            **options,
        ).logits[:, -columns:-1]  # (b, columns - 1, vocabulary), also when the model returned all columns
    labels = batch.labels[:, batch.first_label :].to(device)
    counted = labels != NO_LABEL
    losses = F.cross_entropy(logits[counted].float(), labels[counted], reduction="none")
    return losses * batch.weights[:, batch.first_label :].to(device)[counted], counted


def _can_keep_logits(model: nn.Module) -> bool:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
