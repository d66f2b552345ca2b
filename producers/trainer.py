"""LoRA fine-tuning of one worker: AdamW on the adapter's flat vector, one optimizer step at a time.

The correction of a pull is added to `flat` between two steps, and the next step trains on it.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fedmoe.data.encode import Example
from fedmoe.data.examples import collate, indices
from fedmoe.errors import TooLittleMemoryError
from fedmoe.model.loss import completion_loss
from fedmoe.protocol.rules import TrainingSettings
from producers.spares import Spares

MICRO_BATCH, TOO_LARGE = "micro_batch", "too_large"  # names in the state
MOST_MISSES = 8  # if so many examples in a row do not fit alone, the memory is too small, not they too large
# Texts of a plain RuntimeError of torch: from the CPU's allocator, and from CUDA's libraries.
NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One optimizer step: the weighted mean cross entropy of the labels, their counts, and the position after it.

    `n_tokens` is the number of labels, whatever their weights.
    """

    loss: float
    n_examples: int
    n_tokens: int
    position: int
    applied: bool  # False if loss or gradient was not finite; then the adapter is unchanged


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """A step whose gradient is computed but not applied yet.

    Args:
        loss, n_examples, n_tokens: as in StepResult.
        n_consumed: by how much the position advances; more than n_examples if some do not fit into memory.
    """

    loss: float
    n_examples: int
    n_tokens: int
    n_consumed: int


class Trainer:
    """Trains the adapter in `flat` on examples, in an endless order that the seed fixes.

    The model stays in eval mode, without dropout. So a trainer that is saved (`flat`, `position` and `state()`) and
    restored continues bit for bit.

    If a micro-batch does not fit into memory, it and all later ones are halved; an example that does not fit alone is
    left out. Both are logged once and kept in `state()`.

    Args:
        model: on `device`, with exactly the views of `flat` (numel,) fp32 as its trainable parameters (if it has
            several adapters: once `activate` was called).
        settings: the training settings of the expert's rules.
        batch_size, accumulate: this worker's own values, which override those of the settings; 0 for none.
        seed: of the data order.
        autocast: dtype to compute in; with float32 there is no autocast.
        position: examples consumed so far.
        activate: called before each step; lets a model with several adapters compute with that of this trainer.
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
        activate: Callable[[], None] = lambda: None,
    ) -> None:
        activate()
        self._activate = activate
        self.flat = flat
        self.position = position
        self.skipped = 0
        self.model = model
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
        self._misses: list[int] = []  # those of them since an example last fitted
        self._grad = _flat_gradient(model, flat)
        parameter = nn.Parameter(flat)
        parameter.grad = self._grad
        self._optimizer = torch.optim.AdamW([parameter], weight_decay=settings.weight_decay, fused=True)
        # torch creates these at the first step; created here, `state` has the same entries before and after it.
        self._moments = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
        self._optimizer.state[parameter] = self._moments

    def adopt(self, settings: TrainingSettings) -> None:
        """Train with other settings from the next step on; keep moments, position and the examples that do not fit."""
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

        Every label token counts by its weight, whatever its micro-batch; a mean of the means of micro-batches would
        favour short answers. Half the weight gives half the gradient, also if all labels of the step have it.
        """
        self._activate()
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
        """Compute the gradient of one step in `_grad`; return the micro-batch that does not fit, if one does not."""
        self._grad.zero_()
        if not batches:
            return _Gradient(math.nan, 0)
        made = [collate([self._examples[number] for number in batch], self._pad_id) for batch in batches]
        n_tokens = sum(batch.n_tokens for batch in made)
        total = torch.zeros((), device=self._device)
        for numbers, batch in zip(batches, made, strict=True):
            try:
                loss = completion_loss(self.model, batch, device=self._device, autocast=self._autocast)
                torch.autograd.backward(loss / n_tokens)
                total += loss.detach()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                return numbers  # its memory is freed when the error is released
            self._misses.clear()
        return _Gradient(total.item() / sum(batch.weight for batch in made), n_tokens)

    def _make_do(self, batch: Sequence[int]) -> None:
        """Halve the micro-batch that does not fit into memory, or leave its one example out.

        Raises:
            TooLittleMemoryError: if no example fits any more.
        """
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) > 1:
            self._micro_batch = len(batch) // 2
            log.warning(
                "%d examples at a time do not fit into the memory of %s: training goes on with %d at a time, which is "
                "slower but otherwise the same (--batch-size %d with a larger --accumulate avoids the failed attempt)",
                len(batch), self._device, self._micro_batch, self._micro_batch,
            )  # fmt: skip
            return
        (number,) = batch
        example = self._examples[number]
        where = f"that of line {example.line} ({len(example.input_ids)} tokens)"
        self._too_large.add(number)
        self._misses.append(number)
        if len(self._misses) >= MOST_MISSES or len(self._too_large) == len(self._examples):
            self._too_large.difference_update(self._misses)  # more likely, other processes use the memory
            raise TooLittleMemoryError(
                f"not even one example at a time fits into the memory of {self._device} ({len(self._misses)} in a row "
                f"did not, the last was {where}): free memory there, or give another --device or --precision bf16",
                about="memory",
            )
        log.warning(
            "the example of line %d (%d tokens) does not fit into the memory of %s even alone: it is left out",
            example.line, len(example.input_ids), self._device,
        )  # fmt: skip

    def apply(self, computed: Computed) -> StepResult:
        """Apply the computed step; only this changes adapter, optimizer and position."""
        self.position += computed.n_consumed
        return StepResult(
            loss=computed.loss,
            n_examples=computed.n_examples,
            n_tokens=computed.n_tokens,
            position=self.position,
            applied=computed.n_tokens > 0 and self._apply(computed.loss),
        )

    def state(self, spares: Spares | None = None) -> dict[str, torch.Tensor]:
        """A copy on the CPU of the state that a restart needs, in spare vectors if they are given.

        It holds the optimizer's exp_avg (numel,), exp_avg_sq (numel,) and step (); micro_batch (), the number of
        examples at a time that fit into memory; and too_large (k,), the examples that do not fit alone, if any.
        """
        spares = spares or Spares(len(self.flat))
        state = {name: spares.copy(tensor) for name, tensor in self._moments.items()}
        state[MICRO_BATCH] = torch.tensor(self._micro_batch)
        if self._too_large:
            state[TOO_LARGE] = torch.tensor(sorted(self._too_large))
        return state

    def load_state(self, state: Mapping[str, torch.Tensor], *, same_data: bool = True) -> None:
        """Restore what `state` returned; without `same_data`, not the numbers of the examples that do not fit."""
        if self._moments.keys() <= state.keys():
            for name, tensor in self._moments.items():
                tensor.copy_(state[name])
        else:
            log.warning(
                "the checkpoint has no state of this optimizer (another training wrote it): the optimizer starts afresh"
            )
        if MICRO_BATCH in state:  # older checkpoints have none
            self._micro_batch = min(self._micro_batch, int(state[MICRO_BATCH]))
        if TOO_LARGE in state and same_data:
            self._too_large = set(state[TOO_LARGE].tolist())

    def _apply(self, loss: float) -> bool:
        norm = self._grad.norm().item()  # finite only if every value is finite
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
    """True if torch raised this error because it could not allocate memory, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def _flat_gradient(model: nn.Module, flat: torch.Tensor) -> torch.Tensor:
    """A gradient (numel,) of which every LoRA parameter's `grad` is a view, as its values are of `flat`."""
    grad = torch.zeros_like(flat)
    seen = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
            if ".lora_" not in name:  # else it belongs to another adapter
                raise ValueError(f"the parameter {name} is trainable, but no view of flat")
            continue
        start = parameter.storage_offset() - flat.storage_offset()
        parameter.grad = grad[start : start + parameter.numel()].view_as(parameter)
        seen += parameter.numel()
    if seen != flat.numel():
        raise ValueError(f"the model trains {seen} values, flat has {flat.numel()}")
    return grad
