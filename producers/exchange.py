"""Where training and sync meet: at the boundary between two optimizer steps, for the time of a memory copy.

The training thread never waits for the network: it only adds a correction that is already there, and copies its
adapter when the sync has asked for it. The sync waits for the training, never the other way round.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch

from fedmoe.protocol.rules import TrainingSettings
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


S = TypeVar("S", bound=Step)


class Trains(Protocol):
    """The part of a trainer that the exchange needs: `flat` (numel,) fp32, and `position`, examples consumed."""

    flat: torch.Tensor
    position: int

    def state(self) -> Mapping[str, torch.Tensor]:
        """A copy on the CPU of the optimizer's state."""
        ...

    def adopt(self, settings: TrainingSettings) -> None:
        """Train by these settings from the next step on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """A copy of the training's state at a step boundary, and what was trained since the update before."""

    local: torch.Tensor
    trained: Trained
    position: int
    optimizer: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Exchange:
    """Hands corrections to the training thread and copies of its adapter to the sync thread.

    Args:
        trainer: whose adapter it is.
        with_optimizer: copy the optimizer's state too (for a checkpoint).
        trained: what a resumed worker had trained since its last update.
        abandons: at the end, a step that is under way may be abandoned: the training takes its steps by `take_step`.
    """

    def __init__(
        self, trainer: Trains, *, with_optimizer: bool, trained: Trained | None = None, abandons: bool = True
    ) -> None:
        self._trainer = trainer
        self._with_optimizer = with_optimizer
        self._lock = threading.Lock()
        self._changes: deque[Change] = deque()
        self._settings: TrainingSettings | None = None  # to be taken over at the next boundary
        self._trained = trained or Trained()
        self._wanted = False
        self._consume = False
        self._abandons, self._abandoned = abandons, False
        self._ready = threading.Event()
        self._state: TrainingState | None = None

    @property
    def trained(self) -> Trained:
        """What is in no copy yet that became an update."""
        return self._trained

    @property
    def steps_left(self) -> int:
        """Steps that are in no update yet, those of a copy that nobody has taken included."""
        return self._trained.steps + (self._state.trained.steps if self._state and self._consume else 0)

    def take_step(self, apply: Callable[[], S]) -> S | None:
        """Training thread: apply a step that was computed, and record it; None if it was abandoned meanwhile.

        `apply` alone may change adapter, optimizer and position, so that a copy is always that of whole steps.
        """
        with self._lock:
            if self._abandoned:
                return None
            step = apply()
            self.record(step)
            return step

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
        """Training thread, between two steps: apply corrections and new settings, then copy if a copy is wanted."""
        with self._lock:
            if self._settings is not None:
                self._trainer.adopt(self._settings)
                self._settings = None
            while self._changes:
                self._apply(self._changes[0])  # stays, if the memory for it is not there
                self._changes.popleft()
            self._copy_if_wanted()

    def _copy_if_wanted(self) -> None:
        """With the lock. Corrections that are not applied yet (a step is under way) are added to the copy."""
        if not self._wanted:
            return
        self._wanted = False
        local = self._trainer.flat.detach().to("cpu", copy=True)
        trained, position = self._trained, self._trainer.position
        for change in self._changes:
            local = _changed(local, change)
            trained = Trained() if change.replace else trained
            position = int(change.position) if change.position.isdecimal() else position
        self._state = TrainingState(
            local=local,
            trained=replace(trained, position=str(position)),
            position=position,
            optimizer=self._trainer.state() if self._with_optimizer else {},
        )
        if self._consume:
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

    def adopt(self, settings: TrainingSettings) -> None:
        """Sync thread: have the training go by these settings from the next boundary on."""
        with self._lock:
            self._settings = settings

    def request(self, *, consume: bool) -> None:
        """Sync thread: ask for a copy at the next boundary; corrections given before are in it.

        With `consume` what was trained counts as taken (it becomes an update), else it is only looked at.
        """
        with self._lock:
            self._ready.clear()
            self._wanted, self._consume = True, consume

    def take(self, timeout_s: float) -> TrainingState | None:
        """Sync thread: the copy asked for, or None if training did not reach a boundary in time (ask on)."""
        if not self._ready.wait(timeout_s):
            return None
        state, self._state = self._state, None
        return state

    def take_now(self) -> TrainingState | None:
        """Sync thread, when it is time to end: the copy asked for, without waiting for the end of a step.

        The step under way is abandoned: it is not in the copy, and will not be applied. If steps cannot be abandoned,
        it is waited for.
        """
        while not self._abandons:
            if (state := self.take(1.0)) is not None:
                return state
        with self._lock:
            self._abandoned = True
            self._copy_if_wanted()
        return self.take(0.0)


def _changed(local: torch.Tensor, change: Change) -> torch.Tensor:
    if change.correction is None:
        return local
    return change.correction.clone() if change.replace else local + change.correction
