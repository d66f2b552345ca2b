"""The worker's training in the main thread, from the first step to the final message."""

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from fedmoe.errors import FedMoEError, StoppedError, TooLittleMemoryError
from fedmoe.settings import WorkerSettings
from fedmoe.util.stopping import Stop
from producers.heartbeat import SyncStatus
from producers.membership import Membership
from producers.trainer import StepResult, is_out_of_memory

logger = logging.getLogger(__name__)

END_S = 4.0  # time after the drain to write the last checkpoint; then the process ends in any case


class Progress:
    """The progress of the training, for the progress line and the heartbeat."""

    def __init__(self) -> None:
        self.last: StepResult | None = None
        self.steps = 0
        self._rate = _Rate()

    def add(self, step: StepResult) -> None:
        """Record a step."""
        self.last = step
        self.steps += 1
        self._rate.add(step.n_tokens)

    def line(self, status: SyncStatus) -> str:
        """The progress line."""
        assert self.last is not None
        flight = f"in flight {status.in_flight}" if status.in_flight else "in flight -"
        problem = f"  [{status.problem}]" if status.problem else ""
        return (
            f"step {self.steps}  loss {self.last.loss:.3f}  tokens/s {self._rate.value:.0f}  "
            f"version {status.version}  staleness {status.staleness}  {flight}{problem}"
        )

    def fields(self) -> dict[str, int | float | None]:
        """The heartbeat's fields about the training."""
        loss = round(self.last.loss, 4) if self.last and math.isfinite(self.last.loss) else None
        return {"step": self.steps, "loss": loss, "tokens_per_s": round(self._rate.value, 1)}


class Training:
    """Trains until it is stopped, done or fails; then has the sync publish the remaining progress.

    Args:
        member: a membership that has begun.
        progress: the object that the sync's heartbeat reports.
        n_examples: number of examples in one epoch.
        stop: ends the training; it is also set when the training has ended by itself.
        report: where lines for people go.
    """

    def __init__(
        self,
        trainer: Any,
        member: Membership,
        settings: WorkerSettings,
        *,
        progress: Progress,
        n_examples: int,
        stop: Stop,
        report: Callable[[str], None],
    ) -> None:
        self._trainer = trainer
        self._member = member
        self._exchange, self._sync = member.exchange, member.sync
        self._settings = settings
        self._progress = progress
        self._n_examples = n_examples
        self._stop = stop
        self._report = report
        self._failure: Exception | None = None

    def run(self) -> None:
        """Train, publish, wait for the decision, and report the outcome.

        Raises:
            StoppedError: if the stop came before the first step. Such a stop has the short patience of joining, so
                the connection may be cut off at any moment; nothing is lost.
            FedMoEError: if the training failed or some of it is lost; the message is one sentence.
        """
        self._bound_the_stop()
        if self._stop.is_set():
            raise StoppedError("stopped before the training began: nothing was trained yet", about="training")
        self._member.thread.start()
        self._train()
        self._stop.set()
        if self._progress.last:
            self._report(self._progress.line(self._sync.status))
        try:
            self._report(self._member.finish(self._settings.drain_s, boundary=self._pass_boundary))
        except FedMoEError as error:
            if self._failure is None:
                raise
            raise FedMoEError(f"{self._failure}; {error}", about=error.about) from self._failure
        if self._failure is not None:
            raise self._failure

    def _train(self) -> None:
        """Train step after step; keep an error for later, because the progress is published first."""
        said_at = time.monotonic()
        try:
            while not self._stop.is_set() and self._member.thread.is_alive() and not self._has_done_enough():
                self._exchange.boundary()
                computed = self._trainer.compute()
                step: StepResult | None = self._exchange.take_step(partial(self._trainer.apply, computed))
                if step is None:
                    return
                self._progress.add(step)
                if time.monotonic() - said_at >= self._settings.log_interval_s:
                    said_at = time.monotonic()
                    self._report(self._progress.line(self._sync.status))
        except Exception as error:
            if is_out_of_memory(error) and not isinstance(error, FedMoEError):
                why = str(error).strip().partition("\n")[0]
                error = TooLittleMemoryError(
                    f"the training ran out of memory ({why}): free memory on the device, or give another --device",
                    about="memory",
                )
            logger.warning(
                "the training cannot go on (%s): this worker publishes its progress, then ends",
                error,
            )
            self._failure = error

    def _pass_boundary(self) -> None:
        if self._failure is None:
            self._exchange.boundary()
            return
        try:
            self._exchange.boundary()
        except Exception:  # a training that failed may fail again; the sync then copies without it
            logger.debug("no boundary after the training failed", exc_info=True)

    def _bound_the_stop(self) -> None:
        """From now on a stop could lose training, so it may take as long as the drain."""

        def last_words() -> tuple[str, int]:
            try:
                return self._member.outcome(self._settings.drain_s), 0
            except FedMoEError as error:
                return str(error), error.exit_code

        self._stop.patience_s, self._stop.end_s = self._settings.drain_s, END_S
        self._stop.when_asked.append(lambda: self._sync.finish(self._settings.drain_s))
        self._stop.is_saving = lambda: self._sync.is_saving
        self._stop.last_words = last_words

    def _has_done_enough(self) -> bool:
        settings = self._settings
        epochs = self._trainer.position / self._n_examples
        self._member.is_done = bool(
            (settings.max_steps and self._progress.steps >= settings.max_steps)
            or (settings.max_epochs and epochs >= settings.max_epochs)
        )
        return self._member.is_done


class _Rate:
    """Tokens per second, averaged over about the last ten steps."""

    def __init__(self) -> None:
        self._at = time.monotonic()
        self.value = 0.0

    def add(self, n_tokens: int) -> None:
        now = time.monotonic()
        fresh = n_tokens / max(now - self._at, 1e-6)
        self._at = now
        self.value = fresh if self.value == 0 else 0.9 * self.value + 0.1 * fresh
