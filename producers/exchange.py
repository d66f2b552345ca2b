"""Where training and sync meet: at the boundary between two optimizer steps, for the time of a memory copy.

The training thread never waits for the network: it only adds a correction that is already there, and copies its
adapter when the sync has asked for it. The sync waits for the training, never the other way round.
"""

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from producers.ledger import Change, Trained


class Step(Protocol):
    """What a trainer tells of one step."""

    @property
    def loss(self) -> float:
        """Mean loss a label token."""
        ...

    @property
    def applied(self) -> bool:
        """False if the step was skipped."""
        ...

    @property
    def n_examples(self) -> int:
        """Rows."""
        ...

    @property
    def n_tokens(self) -> int:
        """Label tokens."""
        ...


class Trains(Protocol):
    """The part of a trainer that the exchange needs: `flat` (numel,) fp32, and `position`, examples consumed."""

    flat: torch.Tensor
    position: int

    def state(self) -> Mapping[str, torch.Tensor]:
        """A copy on the CPU of the optimizer's state."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A copy of the training's state at a step boundary, and what was trained since the cut before."""

    local: torch.Tensor
    trained: Trained
    position: int
    optimizer: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Exchange:
    """Hands corrections to the training thread and copies of its adapter to the sync thread.

    Args:
        trainer: whose adapter it is.
        with_optimizer: copy the optimizer's state too (for a checkpoint).
        trained: what a resumed worker had trained since its last cut.
    """

    def __init__(self, trainer: Trains, *, with_optimizer: bool, trained: Trained | None = None) -> None:
        self._trainer = trainer
        self._with_optimizer = with_optimizer
        self._lock = threading.Lock()
        self._changes: deque[Change] = deque()
        self._trained = trained or Trained()
        self._wanted = False
        self._consume = False
        self._ready = threading.Event()
        self._cut: Cut | None = None

    @property
    def steps_left(self) -> int:
        """Steps that are in no update yet, those of a copy that nobody has taken included."""
        return self._trained.steps + (self._cut.trained.steps if self._cut and self._consume else 0)

    def record(self, step: Step) -> None:
        """Training thread: note what one step trained; a step that was skipped (not finite) trained nothing."""
        if not step.applied:
            return
        t = self._trained
        self._trained = replace(
            t,
            n_examples=t.n_examples + step.n_examples,
            n_tokens=t.n_tokens + step.n_tokens,
            steps=t.steps + 1,
            loss_sum=t.loss_sum + step.loss,
        )

    def boundary(self) -> None:
        """Training thread, between two steps: apply corrections, then copy if a copy is wanted."""
        with self._lock:
            while self._changes:
                self._apply(self._changes.popleft())
            if not self._wanted:
                return
            self._wanted = False
            consume = self._consume
        position = self._trainer.position
        self._cut = Cut(
            local=self._trainer.flat.detach().to("cpu", copy=True),
            trained=replace(self._trained, position=str(position)),
            position=position,
            optimizer=self._trainer.state() if self._with_optimizer else {},
        )
        if consume:
            self._trained = Trained()
        self._ready.set()

    def _apply(self, change: Change) -> None:
        flat = self._trainer.flat
        if change.correction is not None:
            correction = change.correction.to(flat.device)
            with torch.no_grad():
                flat.copy_(correction) if change.replace else flat.add_(correction)
        if change.replace:
            self._trained = Trained()
        if change.position.isdecimal():
            self._trainer.position = int(change.position)

    def correct(self, change: Change) -> None:
        """Sync thread: have a change applied at the next boundary."""
        if change.correction is not None or change.replace:
            with self._lock:
                self._changes.append(change)

    def request(self, *, consume: bool) -> None:
        """Sync thread: ask for a copy at the next boundary; corrections given before are in it.

        With `consume` what was trained counts as taken (it becomes an update), else it is only looked at.
        """
        with self._lock:
            self._ready.clear()
            self._wanted, self._consume = True, consume

    def take(self, timeout_s: float) -> Cut | None:
        """Sync thread: the copy asked for, or None if training did not reach a boundary in time (ask on)."""
        if not self._ready.wait(timeout_s):
            return None
        cut, self._cut = self._cut, None
        return cut
