"""LoRA fine-tuning of one worker: AdamW on the adapter's flat vector, one optimizer step at a time.

What comes from elsewhere (a pull) is added to `flat` between two steps, and the next step trains on it.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fedmoe.data.encode import Example
from fedmoe.data.examples import collate, indices
from fedmoe.errors import TooLittleMemoryError
from fedmoe.model.loss import completion_loss
from fedmoe.protocol.rules import TrainingSettings

MICRO_BATCH, TOO_LARGE = "micro_batch", "too_large"  # in the state
MOST_MISSES = 8  # so many examples in a row that do not fit alone: then it is not they that are too large
# What torch says in a plain RuntimeError: the CPU's allocator, and CUDA's libraries.
NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One optimizer step: the labels' mean cross entropy by their weights, what went into it, the position after it.

    `n_tokens` is the number of labels, whatever they weigh.
    """

    loss: float
    n_examples: int
    n_tokens: int
    position: int
    applied: bool  # False: loss or gradient was not finite, and the adapter stayed as it was


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """A step whose gradient is there and not applied yet.

    Args:
        loss, n_examples, n_tokens: as in StepResult.
        n_consumed: how far the position goes on; more than n_examples if some do not fit into memory.
    """

    loss: float
    n_examples: int
    n_tokens: int
    n_consumed: int


class Trainer:
    """Trains the adapter in `flat` on examples, in an endless order that the seed fixes.

    The model stays in eval mode: without dropout, a trainer that is stopped, saved (`flat`, `position` and
    `state()`) and made anew goes on to the same bits.

    A micro-batch that does not fit into memory is halved, and so are all later ones; an example that does not fit
    alone is left out. Both are said once and remembered (in `state()`, too).

    Args:
        model: on `device`, with exactly the views of `flat` (numel,) fp32 as its trainable parameters.
        settings: of the expert's rules.
        batch_size, accumulate: this worker's own, which go before those of the settings; 0 for none.
        seed: of the data order.
        autocast: dtype to compute in; float32 means no autocast.
        position: examples consumed so far.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        flat: torch.Tensor,
        examples: Sequence[Example],
        pad_id: int,
        settings: TrainingSettings,
        seed: int,
        device: torch.device,
        autocast: torch.dtype = torch.float32,
        position: int = 0,
        batch_size: int = 0,
        accumulate: int = 0,
    ) -> None:
        self.flat = flat
        self.position = position
        self.skipped = 0
        self._model = model
        self._examples = examples
        self._pad_id = pad_id
        own = {"batch_size": batch_size, "accumulate": accumulate}
        self._own = {name: value for name, value in own.items() if value}
        self._rules, self._settings = settings, replace(settings, **self._own)
        self._seed = seed
        self._device = device
        self._autocast = autocast
        self._micro_batch = self._settings.batch_size
        self._too_large: set[int] = set()  # examples that do not fit even alone
        self._misses: list[int] = []  # those of them since something fitted last
        self._grad = _flat_gradient(model, flat)
        parameter = nn.Parameter(flat)
        parameter.grad = self._grad
        self._optimizer = torch.optim.AdamW([parameter], weight_decay=settings.weight_decay, fused=True)
        # What torch makes at the first step; made here, the state is the same before and after it.
        self._moments = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
        self._optimizer.state[parameter] = self._moments

    def adopt(self, settings: TrainingSettings) -> None:
        """Train by other settings from the next step on; optimizer moments, position and what did not fit stay."""
        for name, value in self._own.items():
            if getattr(settings, name) not in (value, getattr(self._rules, name)):
                log.info("this worker keeps its own --%s %d", name.replace("_", "-"), value)
        before = self._settings
        self._rules, self._settings = settings, replace(settings, **self._own)
        fitted = self._micro_batch == before.batch_size
        largest = self._settings.batch_size
        self._micro_batch = largest if fitted else min(self._micro_batch, largest)
        for group in self._optimizer.param_groups:
            group["weight_decay"] = settings.weight_decay

    def step(self) -> StepResult:
        """`compute` and `apply`."""
        return self.apply(self.compute())

    def compute(self) -> Computed:
        """Loss and gradient of the next `accumulate` × `batch_size` examples; adapter and position stay as they are.

        Every label token counts by its weight, in whichever micro-batch it comes: a mean of their means would
        favour short answers. Half the weight is half the gradient, also if all of the step have that weight.
        """
        count = self._settings.accumulate * self._settings.batch_size
        numbers = indices(self.position, count, len(self._examples), self._seed)
        while True:
            used = [number for number in numbers if number not in self._too_large]
            batches = [
                used[start : start + self._micro_batch] for start in range(0, len(used), self._micro_batch)
            ]
            done = self._gradient(batches)
            if isinstance(done, _Gradient):
                return Computed(
                    loss=done.loss, n_examples=len(used), n_tokens=done.n_tokens, n_consumed=count
                )
            self._make_do(done)

    def _gradient(self, batches: Sequence[list[int]]) -> "_Gradient | list[int]":
        """The gradient of one step in `_grad`; or the micro-batch that does not fit into memory."""
        self._grad.zero_()
        if not batches:
            return _Gradient(math.nan, 0)
        made = [collate([self._examples[number] for number in batch], self._pad_id) for batch in batches]
        n_tokens = sum(batch.n_tokens for batch in made)
        total = torch.zeros((), device=self._device)
        for numbers, batch in zip(batches, made, strict=True):
            try:
                loss = completion_loss(self._model, batch, device=self._device, autocast=self._autocast)
                torch.autograd.backward(loss / n_tokens)
                total += loss.detach()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                return numbers  # what it had taken is free once the error is gone
            self._misses.clear()
        return _Gradient(total.item() / sum(batch.weight for batch in made), n_tokens)

    def _make_do(self, batch: Sequence[int]) -> None:
        """Remember that this micro-batch does not fit into memory.

        Raises:
            TooLittleMemoryError: if nothing fits any more.
        """
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) > 1:
            self._micro_batch = len(batch) // 2
            log.warning(
                "%d examples at a time do not fit into the memory of %s: going on with %d at a time, which learns the "
                "same but is slower (--batch-size %d with a larger --accumulate avoids the failed try)",
                len(batch), self._device, self._micro_batch, self._micro_batch,
            )  # fmt: skip
            return
        (number,) = batch
        example = self._examples[number]
        where = f"that of line {example.line} ({len(example.input_ids)} tokens)"
        self._too_large.add(number)
        self._misses.append(number)
        if len(self._misses) >= MOST_MISSES or len(self._too_large) == len(self._examples):
            self._too_large.difference_update(self._misses)  # more likely, others have taken the memory
            raise TooLittleMemoryError(
                f"not even one example at a time fits into the memory of {self._device} ({len(self._misses)} in a row "
                f"did not, the last was {where}): free memory there, or give another --device or --precision bf16"
            )
        log.warning(
            "the example of line %d (%d tokens) does not fit into the memory of %s even alone: left out",
            example.line, len(example.input_ids), self._device,
        )  # fmt: skip

    def apply(self, computed: Computed) -> StepResult:
        """Take the step that was computed: this alone changes adapter, optimizer and position."""
        self.position += computed.n_consumed
        return StepResult(
            loss=computed.loss,
            n_examples=computed.n_examples,
            n_tokens=computed.n_tokens,
            position=self.position,
            applied=computed.n_tokens > 0 and self._apply(computed.loss),
        )

    def state(self) -> dict[str, torch.Tensor]:
        """A copy on the CPU of what a restart needs.

        The optimizer's exp_avg (numel,), exp_avg_sq (numel,) and step (); micro_batch (), the most examples at a time
        that fit into memory; and too_large (k,), the examples that do not fit alone, if there are any.
        """
        state = {name: tensor.to("cpu", copy=True) for name, tensor in self._moments.items()}
        state[MICRO_BATCH] = torch.tensor(self._micro_batch)
        if self._too_large:
            state[TOO_LARGE] = torch.tensor(sorted(self._too_large))
        return state

    def load_state(self, state: Mapping[str, torch.Tensor], *, same_data: bool = True) -> None:
        """Take over what `state` returned; with other examples, not which of them do not fit."""
        if self._moments.keys() <= state.keys():
            for name, tensor in self._moments.items():
                tensor.copy_(state[name])
        else:
            log.warning(
                "the checkpoint has no state of this optimizer (another training wrote it): it begins anew"
            )
        if MICRO_BATCH in state:  # older checkpoints have none
            self._micro_batch = min(self._micro_batch, int(state[MICRO_BATCH]))
        if TOO_LARGE in state and same_data:
            self._too_large = set(state[TOO_LARGE].tolist())

    def _apply(self, loss: float) -> bool:
        norm = self._grad.norm().item()  # finite only if every value is
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skipped += 1
            log.warning("step skipped: loss %s, gradient norm %s (%d so far)", loss, norm, self.skipped)
            return False
        if norm > self._settings.clip_norm:
            self._grad.mul_(self._settings.clip_norm / norm)
        warmup = self._settings.warmup_steps
        done = self._moments["step"].item()
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * min(1.0, (done + 1) / max(warmup, 1))
        self._optimizer.step()
        return True


@dataclass(frozen=True, slots=True)
class _Gradient:
    loss: float
    n_tokens: int


def is_out_of_memory(error: Exception) -> bool:
    """True for what torch raises when memory cannot be had, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def _flat_gradient(model: nn.Module, flat: torch.Tensor) -> torch.Tensor:
    """A gradient (numel,) of which every LoRA parameter's `grad` is a view, as its values are of `flat`."""
    grad = torch.zeros_like(flat)
    seen = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
            raise ValueError("a trainable parameter is no view of flat: make it so by attach_adapter")
        start = parameter.storage_offset() - flat.storage_offset()
        parameter.grad = grad[start : start + parameter.numel()].view_as(parameter)
        seen += parameter.numel()
    if seen != flat.numel():
        raise ValueError(f"the model trains {seen} values, flat has {flat.numel()}")
    return grad
