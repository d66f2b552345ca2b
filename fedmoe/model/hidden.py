"""The base model's hidden states of prompts, by which a router finds the expert that a prompt belongs to."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from fedmoe.data.encode import Example
from fedmoe.errors import StoppedError

BATCH = 4  # prompts


def prompt_states(model: PreTrainedModel, examples: Sequence[Example], **options: Any) -> torch.Tensor:
    """The state of each example's prompt, (n, d) fp32 on the CPU: that of the last token before the first answer.

    It is the last layer's output, after the final norm, scaled to length 1: so no row counts more than another in a
    mean of rows, and one row can move the mean of n rows by at most 2 / n. The mean over the prompt's tokens routes
    worse (docs/benchmarks.md).

    Args:
        model: the bare base model, or one whose adapters are disabled.
        examples: with a prompt each.
        options: as in `hidden_states`.

    Raises:
        StoppedError: if it was told to stop.
    """
    return torch.cat([scaled(last_token(*batch)) for batch in hidden_states(model, examples, **options)])


def hidden_states(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    pad_id: int,
    device: torch.device,
    autocast: torch.dtype = torch.float32,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The last layer's output (b, L, d) fp32 for batches of prompts, padded on the right, and their masks (b, L) int64.

    Args:
        model: the bare base model.
        examples: their tokens before the first answer are the prompts.
        pad_id: fills up a batch.
        device: of the model.
        autocast: dtype to compute in.
        stopped: called before each batch; True ends the computation.

    Raises:
        StoppedError: if `stopped` returns True.
    """
    for first in range(0, len(examples), BATCH):
        if stopped():
            raise StoppedError("stopped before the training began: nothing was trained yet", about="training")
        ids, mask = (one.to(device) for one in _padded(examples[first : first + BATCH], pad_id))
        with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast != torch.float32):
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        yield hidden.float(), mask


def last_token(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The state (b, d) of each prompt's last token."""
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]


def scaled(states: torch.Tensor) -> torch.Tensor:
    """States (b, d) scaled to length 1, on the CPU."""
    return torch.nn.functional.normalize(states, dim=1).cpu()


def _padded(examples: Sequence[Example], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts, padded on the right, and their mask, each (b, L) int64."""
    prompts = [example.input_ids[: example.answers[0].start] for example in examples]
    shape = len(prompts), max(map(len, prompts))
    ids, mask = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    return ids, mask
