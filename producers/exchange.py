"""Hands corrections and copies between training and sync at a step boundary, for the duration of a memory copy.

It also hands over bases, whose validation loss the training measures, and what was measured.

The training thread never waits for the network. It adds a correction that has already arrived, and copies its adapter
when the sync has asked for a copy. The sync waits for the training, never the other way round.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch

from fedmoe.protocol.records import Meta
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.protocol.validation import Measured
from producers.ledger import Change, Trained
from producers.spares import Spares


class Step(Protocol):
    """The result of one optimizer step."""

    @property
    def loss(self) -> float:
        """Mean loss per label token."""
        ...

    @property
    def applied(self) -> bool:
        """False if the step was skipped."""
        ...

    @property
    def n_examples(self) -> int:
        """Number of rows."""
        ...

    @property
    def n_tokens(self) -> int:
        """Number of label tokens."""
        ...


S = TypeVar("S", bound=Step)


class Trains(Protocol):
    """The part of a trainer that the exchange needs: `flat` (numel,) fp32, and `position`, examples consumed."""

    flat: torch.Tensor
    position: int

    def state(self, spares: Spares) -> Mapping[str, torch.Tensor]:
        """A copy on the CPU of the optimizer's state, in spare vectors where they fit."""
        ...

    def adopt(self, settings: TrainingSettings) -> None:
        """Train with these settings from the next step on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """A copy of the training's state at a step boundary, with counts of the training since the last update."""

    local: torch.Tensor
    trained: Trained
    position: int
    optimizer: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Exchange:
    """Hands corrections to the training thread and copies of its adapter to the sync thread.

    Args:
        trainer: owner of the adapter.
        with_optimizer: copy the optimizer's state too (for a checkpoint).
        trained: counts of what a resumed worker had trained since its last update.
        abandons: the current step may be abandoned at the end, because the training takes its steps by `take_step`.
        spares: from which copies are taken, and to which corrections are given when they are added; the ledger's.
    """

    def __init__(
        self,
        trainer: Trains,
        *,
        with_optimizer: bool,
        trained: Trained | None = None,
        abandons: bool = True,
        spares: Spares | None = None,
    ) -> None:
        self._trainer = trainer
        self._with_optimizer = with_optimizer
        self._lock = threading.Lock()
        self._changes: deque[Change] = deque()
        self._settings: TrainingSettings | None = None  # to be adopted at the next boundary
        self._spares = spares or Spares(trainer.flat.numel())
        self._trained = trained or Trained()
        self._earlier = self._trained.steps  # of these, those that an earlier process trained
        self._dropped = 0
        self._tell: deque[Callable[[int], object]] = deque()  # one for each change that drops training
        self._wanted = False
        self._consume = False
        self._abandons, self._abandoned = abandons, False
        self._ready = threading.Event()
        self._state: TrainingState | None = None
        self._wants_base = False
        self._base: tuple[int, torch.Tensor] | None = None
        self._measured: Measured | None = None
        self._pulled: Meta | None = None
        self._outlived = False  # the base that was taken last is no longer of the expert's history

    @property
    def trained(self) -> Trained:
        """Counts of the training that is in no update yet."""
        return self._trained

    @property
    def steps_left(self) -> int:
        """Number of steps that are in no update yet, including those of a copy that the sync has not taken."""
        return self._trained.steps + (self._state.trained.steps if self._state and self._consume else 0)

    @property
    def dropped(self) -> int:
        """Number of steps of this process that are in no update and never will be: changes replaced the adapter."""
        return self._dropped

    def take_step(self, apply: Callable[[], S]) -> S | None:
        """Training thread: apply a computed step and record it; return None if it was abandoned meanwhile.

        Only `apply` may change adapter, optimizer and position, so that a copy always holds whole steps.
        """
        with self._lock:
            if self._abandoned:
                return None
            step = apply()
            self.record(step)
            return step

    def record(self, step: Step) -> None:
        """Training thread: count one step; a skipped step (not finite) trained nothing."""
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
        """Training thread, between two steps: apply new settings and corrections, then copy if a copy is wanted."""
        with self._lock:
            if self._settings is not None:
                self._trainer.adopt(self._settings)
                self._settings = None
            while self._changes:
                self.apply_change(self._changes[0])  # stays in the queue if memory runs out
                if (added := self._changes.popleft().correction) is not None:
                    self._spares.give(added)
            self._copy_if_wanted()

    def _copy_if_wanted(self) -> None:
        """Copy, with the lock held. Corrections that are not applied yet (during a step) are added to the copy."""
        if not self._wanted:
            return
        self._wanted = False
        local = self._spares.copy(self._trainer.flat)
        position = self._trainer.position
        for change in self._changes:
            _add(change, local)
            self._drop_if_replaced(change)
            position = int(change.position) if change.position.isdecimal() else position
        self._state = TrainingState(
            local=local,
            trained=replace(self._trained, position=str(position)),
            position=position,
            optimizer=self._trainer.state(self._spares) if self._with_optimizer else {},
        )
        if self._consume:
            self._trained, self._earlier = Trained(), 0
        self._ready.set()

    def apply_change(self, change: Change) -> None:
        """Add a correction to the adapter, or replace the adapter by it."""
        _add(change, self._trainer.flat)
        self._drop_if_replaced(change)
        if change.position.isdecimal():
            self._trainer.position = int(change.position)

    def _drop_if_replaced(self, change: Change) -> None:
        """Count what a change drops, and tell; only now is it known, because training went on until here."""
        if not change.replace:
            return
        steps, self._trained = self._trained.steps, Trained()
        self._dropped += steps - self._earlier
        self._earlier = 0
        if self._tell:
            self._tell.popleft()(steps)

    def correct(self, change: Change, tell: Callable[[int], object] | None = None) -> None:
        """Sync thread: have a change applied at the next boundary; `tell` is given the number of steps it drops."""
        if change.correction is not None or change.replace:
            with self._lock:
                self._changes.append(change)
                if change.replace:
                    self._tell.append(tell or (lambda steps: None))

    def adopt(self, settings: TrainingSettings) -> None:
        """Sync thread: have the training use these settings from the next boundary on."""
        with self._lock:
            self._settings = settings

    def request(self, *, consume: bool) -> None:
        """Sync thread: ask for a copy at the next boundary; it includes the corrections given before.

        With `consume` the copy becomes an update, and the counts of the training start again at zero.
        """
        with self._lock:
            self._ready.clear()
            self._wanted, self._consume = True, consume

    def take(self, timeout_s: float) -> TrainingState | None:
        """Sync thread: the requested copy, or None if training reached no boundary in time (then call again)."""
        if not self._ready.wait(timeout_s):
            return None
        state, self._state = self._state, None
        return state

    def give_back(self, state: TrainingState) -> None:
        """Sync thread: use the memory of a copy again, which nobody needs any more."""
        for copy in (state.local, *state.optimizer.values()):
            self._spares.give(copy)

    def take_now(self) -> TrainingState | None:
        """Sync thread, at the end of the drain: the requested copy, without waiting for the end of a step.

        The current step is abandoned: it is not in the copy and will not be applied. If steps cannot be abandoned, the
        sync waits for the end of this one.
        """
        while not self._abandons:
            if (state := self.take(1.0)) is not None:
                return state
        with self._lock:
            self._abandoned = True
            self._copy_if_wanted()
        return self.take(0.0)

    def want_base(self) -> None:
        """Training thread: ask for a copy of the next base, to measure its validation loss."""
        with self._lock:
            self._wants_base = True

    def offer_base(self, meta: Meta, base: torch.Tensor | None) -> None:
        """Sync thread, at each pull: copy the base, if it is a new one and the training wants one.

        If the expert has left the history of the pull before, what was measured there is forgotten.
        """
        if self._pulled is not None and _has_left(self._pulled, meta):
            self._forget()
        self._pulled = meta
        if base is None or not self._wants_base:
            return
        copy = meta.version, base.clone()
        with self._lock:
            self._base, self._wants_base = copy, False

    def _forget(self) -> None:
        """Forget what was measured; what is being measured will be forgotten (`publish`)."""
        with self._lock:
            self._wants_base = self._wants_base or self._base is not None
            self._base, self._measured, self._outlived = None, None, True

    def take_base(self) -> tuple[int, torch.Tensor] | None:
        """Training thread: the copy with its version, None if there is none yet."""
        with self._lock:
            base, self._base = self._base, None
            if base is not None:
                self._outlived = False
        return base

    def publish(self, measured: Measured) -> bool:
        """Training thread: have the next update carry the validation loss of the base that was taken last.

        Returns False if the expert has left the history of that base; the loss is then forgotten.
        """
        with self._lock:
            if not self._outlived:
                self._measured = measured
            return not self._outlived

    def take_measured(self) -> Measured | None:
        """Sync thread: the validation loss that the next update carries."""
        with self._lock:
            measured, self._measured = self._measured, None
        return measured


def _has_left(before: Meta, now: Meta) -> bool:
    """True if versions that were there before are not there now: another lineage, a rollback, or a failover."""
    return (
        now.lineage != before.lineage or now.version < before.version or now.rolled_back != before.rolled_back
    )


def _add(change: Change, local: torch.Tensor) -> None:
    if change.correction is not None:
        correction = change.correction.to(local.device)
        with torch.no_grad():
            local.copy_(correction) if change.replace else local.add_(correction)
