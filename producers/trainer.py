"""LoRA fine-tuning of one worker: AdamW on the adapter's flat vector, one optimizer step at a time.

What comes from elsewhere (a pull) is added to `flat` between two steps, and the next step trains on it.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedmoe.data.encode import Example
from fedmoe.data.examples import collate, indices
from fedmoe.model.loss import completion_loss
from fedmoe.spec import TrainingSettings

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
    """A step whose gradient is there and not applied yet: mean loss per label token, rows and label tokens."""

    loss: float
    n_examples: int
    n_tokens: int


class Trainer:
    """Trains the adapter in `flat` on examples, in an endless order that the seed fixes.

    The model stays in eval mode: without dropout, a trainer that is stopped, saved (`flat`, `position` and
    `state()`) and made anew goes on to the same bits.

    Args:
        model: on `device`, with exactly the views of `flat` (numel,) fp32 as its trainable parameters.
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
    ) -> None:
        self.flat = flat
        self.position = position
        self.skipped = 0
        self._model = model
        self._examples = examples
        self._pad_id = pad_id
        self._settings = settings
        self._seed = seed
        self._device = device
        self._autocast = autocast
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

    def step(self) -> StepResult:
        """`compute` and `apply`."""
        return self.apply(self.compute())

    def compute(self) -> Computed:
        """Loss and gradient of the next `accumulate` × `batch_size` examples; adapter and position stay as they are.

        Every label token counts by its weight, in whichever micro-batch it comes: a mean of their means would
        favour short answers. Half the weight is half the gradient, also if all of the step have that weight.
        """
        batch_size = self._settings.batch_size
        count = self._settings.accumulate * batch_size
        rows = indices(self.position, count, len(self._examples), self._seed)
        batches = [
            collate([self._examples[row] for row in rows[start : start + batch_size]], self._pad_id)
            for start in range(0, count, batch_size)
        ]
        n_tokens = sum(batch.n_tokens for batch in batches)
        self._grad.zero_()
        total = torch.zeros((), device=self._device)
        for batch in batches:
            loss = completion_loss(self._model, batch, device=self._device, autocast=self._autocast)
            torch.autograd.backward(loss / n_tokens)
            total += loss.detach()
        mean = total.item() / sum(batch.weight for batch in batches)
        return Computed(loss=mean, n_examples=count, n_tokens=n_tokens)

    def apply(self, computed: Computed) -> StepResult:
        """Take the step that was computed: this alone changes adapter, optimizer and position."""
        self.position += computed.n_examples
        return StepResult(
            loss=computed.loss,
            n_examples=computed.n_examples,
            n_tokens=computed.n_tokens,
            position=self.position,
            applied=self._apply(computed.loss),
        )

    def state(self) -> dict[str, torch.Tensor]:
        """A copy on the CPU of the optimizer's state: exp_avg (numel,), exp_avg_sq (numel,), step ()."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self._moments.items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state` returned."""
        for name, tensor in self._moments.items():
            tensor.copy_(state[name])

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
