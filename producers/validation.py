"""Measures the loss of the experts' bases on rows that this worker never trains on, beside the training.

What is measured is the base that was pulled, not the worker's own adapter: it is put into an adapter of its own on the
same base model, so that nothing of the training is touched. A measurement goes on batch by batch between two training
steps, and only while all measurements together took less than VALIDATION_SHARE of the time that was spent on training.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from fedmoe.data.encode import Example
from fedmoe.data.examples import collate
from fedmoe.model.loss import completion_loss
from fedmoe.protocol.validation import Measured
from producers.trainer import is_out_of_memory

logger = logging.getLogger(__name__)

VALIDATION_SHARE = 0.02  # of a worker's compute


class Evaluator:
    """Computes the loss of an adapter on fixed examples, a batch at a time.

    Args:
        model: on `device`; `activate` lets it compute with the adapter in `flat` (numel,) fp32.
        examples: those of the validation rows; rows: number of the rows; rows_set: digest of them.
        batch_size: examples in one batch.
        autocast: dtype to compute in; with float32 there is no autocast.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        flat: torch.Tensor,
        activate: Callable[[], None],
        examples: Sequence[Example],
        rows: int,
        rows_set: str,
        batch_size: int,
        pad_id: int,
        device: torch.device,
        autocast: torch.dtype = torch.float32,
    ) -> None:
        self._model = model
        self._flat = flat
        self._activate = activate
        # Rows of similar length share a batch, so that little is computed on padding.
        self._examples = sorted(examples, key=lambda example: len(example.input_ids))
        self._rows, self._rows_set = rows, rows_set
        self._batch_size = batch_size
        self._pad_id = pad_id
        self._device = device
        self._autocast = autocast
        self._at, self._total, self._weight, self._version = 0, 0.0, 0.0, 0

    def begin(self, version: int, base: torch.Tensor) -> None:
        """Begin to measure these weights (numel,) fp32 of a version of the expert."""
        with torch.no_grad():
            self._flat.copy_(base)
        self._at, self._total, self._weight, self._version = 0, 0.0, 0.0, version

    @torch.no_grad()
    def step(self) -> Measured | None:
        """Compute one batch; the measurement after the last one, None before."""
        self._activate()
        batch = collate(self._examples[self._at : self._at + self._batch_size], self._pad_id)
        self._total += completion_loss(
            self._model, batch, device=self._device, autocast=self._autocast
        ).item()
        self._weight += batch.weight
        self._at += self._batch_size
        if self._at < len(self._examples):
            return None
        loss = self._total / self._weight if self._weight else math.nan
        return Measured(loss=loss, version=self._version, rows=self._rows, rows_set=self._rows_set)


class Measures(Protocol):
    """Measures the loss of a base, a part of it at each step."""

    def begin(self, version: int, base: torch.Tensor) -> None:
        """Begin to measure these weights (numel,) fp32 of a version of the expert."""
        ...

    def step(self) -> Measured | None:
        """Go on; the measurement at the end, None before."""
        ...


class Meets(Protocol):
    """The part of an exchange that hands over bases and measurements."""

    def want_base(self) -> None:
        """Ask for a copy of the base at the next pull that brings a new one."""
        ...

    def take_base(self) -> tuple[int, torch.Tensor] | None:
        """The copy that was asked for, with its version; None if there is none yet."""
        ...

    def publish(self, measured: Measured) -> bool:
        """Have the next update carry a measurement; False if the expert has left the history of its base."""
        ...


class Validation:
    """Measures in turn for each expert that a worker trains.

    Args:
        parts: name, evaluator and exchange of each expert.
        report: called with the name and a line for people after each measurement.
        share: of the training's time that all measurements together may take.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        parts: Sequence[tuple[str, Measures, Meets]],
        *,
        report: Callable[[str, str], None],
        share: float = VALIDATION_SHARE,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._parts = deque(parts)
        self._report = report
        self._share = share
        self._clock = clock
        self._is_measuring = False  # the first of the parts
        self._steps, self._batch_s = 0, 0.0
        self.trained_s = self.spent_s = 0.0

    def trained(self, seconds: float) -> None:
        """Note how long a training step took."""
        self._steps += 1
        self.trained_s += seconds

    def between_steps(self) -> None:
        """Compute at most one batch, if there is time for it and something to measure."""
        if not self._parts or not self._steps:
            return
        # A batch has no backward pass; until one was computed, it is taken to be as long as a step.
        cost = self._batch_s or self.trained_s / self._steps
        if self.spent_s + cost > self._share * self.trained_s:
            return
        began = self._clock()
        try:
            self._batch()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning(
                "the validation rows do not fit into memory beside the training: no validation loss is measured any "
                "more, and the training goes on"
            )
            self._parts.clear()
        took = self._clock() - began
        self.spent_s += took

    def _batch(self) -> None:
        if not self._is_measuring and not self._begin():
            return
        name, evaluator, exchange = self._parts[0]
        began = self._clock()
        measured = evaluator.step()
        self._batch_s = max(self._clock() - began, 0.9 * self._batch_s)
        if measured is None:
            return
        self._is_measuring = False
        self._parts.rotate(-1)
        exchange.want_base()
        if not math.isfinite(measured.loss):
            logger.warning("the validation loss of %s is %s: it is not published", name, measured.loss)
            return
        if exchange.publish(measured):
            self._report(
                name,
                f"validation loss {measured.loss:.4f} on {measured.rows} rows at version {measured.version}",
            )

    def _begin(self) -> bool:
        """Begin with the first part that has a base; False if none has."""
        for _ in range(len(self._parts)):
            _, evaluator, exchange = self._parts[0]
            if base := exchange.take_base():
                evaluator.begin(*base)
                self._is_measuring = True
                return True
            self._parts.rotate(-1)
        return False
