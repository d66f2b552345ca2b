"""The worker's training in the main thread, from the first step to the final message."""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedmoe.errors import FedMoEError, StoppedError, TooLittleMemoryError
from fedmoe.settings import WorkerSettings
from fedmoe.util.stopping import Stop
from producers.heartbeat import SyncStatus
from producers.membership import Membership, finish, outcomes, pass_boundaries
from producers.trainer import StepResult, is_out_of_memory
from producers.validation import Evaluator, Validation

logger = logging.getLogger(__name__)

LEAVE_S = 0.5  # time after the drain to record in Redis how the worker left
END_S = 4.0  # time after the drain to write the last checkpoint; then the process ends in any case


class Progress:
    """The progress of the training, for the progress line and the heartbeat."""

    def __init__(self) -> None:
        self.last: StepResult | None = None
        self.steps = self.n_examples = self.n_tokens = 0
        self._rate = _Rate()

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second, over about the last ten steps."""
        return self._rate.value

    def add(self, step: StepResult) -> None:
        """Record a step."""
        self.last = step
        self.steps += 1
        self.n_examples += step.n_examples
        self.n_tokens += step.n_tokens
        self._rate.add(step.n_tokens)

    def line(self, status: SyncStatus) -> str:
        """The progress line."""
        assert self.last is not None
        flight = f"in flight {status.in_flight}" if status.in_flight else "in flight -"
        problem = f"  [{status.problem}]" if status.problem else ""
        return (
            f"step {self.steps}  loss {self.last.loss:.3f}  tokens/s {self.tokens_per_s:.0f}  "
            f"version {status.version}  staleness {status.staleness}  {flight}{problem}"
        )

    def fields(self) -> dict[str, int | float | None]:
        """The heartbeat's fields about the training."""
        loss = round(self.last.loss, 4) if self.last and math.isfinite(self.last.loss) else None
        return {"step": self.steps, "loss": loss, "tokens_per_s": round(self.tokens_per_s, 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One expert of those that a worker trains by turns, a step each.

    Args:
        expert: its name.
        trainer: of its adapter.
        member: its membership, which has begun.
        progress: the object that the heartbeat of this membership reports.
        evaluator: measures the validation loss of the expert; None if no rows are held back.
    """

    expert: str
    trainer: Any
    member: Membership
    progress: Progress
    evaluator: Evaluator | None = None

    @property
    def line(self) -> str:
        """The progress line of this expert."""
        return self.progress.line(self.member.sync.status)


class Training:
    """Trains until it is stopped, done or fails; then has the sync publish the remaining progress.

    Args:
        turns: the experts to train. Each has its own trainer, so its own optimizer state, warm-up and position. If the
            sync of one ends early (its expert was removed, for example), the others are trained on.
        n_examples: number of examples in one epoch.
        stop: ends the training; it is also set when the training has ended by itself.
        report: where lines for people go.
    """

    def __init__(
        self,
        turns: Sequence[Turn],
        settings: WorkerSettings,
        *,
        n_examples: int,
        stop: Stop,
        report: Callable[[str], None],
    ) -> None:
        self._turns = list(turns)
        self._next = deque(turns)
        self._members = {turn.expert: turn.member for turn in turns}
        self._settings = settings
        self._n_examples = n_examples
        self._stop = stop
        self._report = report
        self._failure: Exception | None = None
        self._validation = Validation(
            [(turn.expert, turn.evaluator, turn.member.exchange) for turn in turns if turn.evaluator],
            report=lambda expert, line: report(self._named(expert, line)),
        )

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
        for member in self._members.values():
            member.thread.start()
        self._train()
        self._stop.set()
        self._report_progress()
        finish(list(self._members.values()), self._settings.drain_s, boundary=self._pass_boundary)
        try:
            for expert, sentence in outcomes(self._members, self._settings.drain_s).items():
                self._report(self._named(expert, sentence))
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
            while turn := self._next_turn():
                began = time.perf_counter()
                computed = turn.trainer.compute()
                apply = partial(turn.trainer.apply, computed)
                step: StepResult | None = turn.member.exchange.take_step(apply)
                if step is None:  # its sync ended without waiting for the step
                    self._drop(turn)
                    continue
                self._validation.trained(time.perf_counter() - began)
                turn.progress.add(step)
                self._validation.between_steps()
                if time.monotonic() - said_at >= self._settings.log_interval_s:
                    said_at = time.monotonic()
                    self._report_progress()
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

    def _next_turn(self) -> Turn | None:
        """Pass the boundary; whose turn it is then, None at the end of the training."""
        enough_since: float | None = None
        while not self._stop.is_set():
            members = self._members.values()
            may_drop = any(one.thread.is_alive() and one.sync.outbox.must_pull for one in members)
            pass_boundaries(members)  # may drop steps, which then do not count
            if not self._has_done_enough():
                return self._take_turn()
            now = time.monotonic()
            enough_since = enough_since or now
            if not may_drop or now - enough_since > self._settings.drain_s:
                return None
            self._stop.wait(0.02)
        return None

    def _take_turn(self) -> Turn | None:
        """Whose turn it is; None if nothing is left to train. An expert whose sync has ended is trained no more."""
        for turn in [turn for turn in self._next if not turn.member.thread.is_alive()]:
            self._drop(turn)
        for _ in range(len(self._next)):
            self._next.rotate(-1)
            if self._epochs(self._next[-1]) < (self._settings.max_epochs or math.inf):
                return self._next[-1]
        return None

    def _drop(self, turn: Turn) -> None:
        self._next.remove(turn)
        if self._next:
            logger.warning(
                "%s is trained no more (%s); this worker trains %s alone from now on",
                turn.expert, turn.member.sync.failure or "its sync has ended", self._next[0].expert,
            )  # fmt: skip

    def _named(self, expert: str, sentence: str) -> str:
        """The sentence with the expert's name before it, unless it is the only one and the worker's own."""
        is_clear = len(self._turns) == 1 and expert == self._settings.stream
        return sentence if is_clear else f"{expert}: {sentence}"

    def _report_progress(self) -> None:
        for turn in self._turns:
            if turn.progress.last and turn in self._next:
                self._report(self._named(turn.expert, turn.line))

    def _pass_boundary(self) -> None:
        if self._failure is None:
            pass_boundaries(self._members.values())
            return
        try:
            pass_boundaries(self._members.values())
        except Exception:  # a training that failed may fail again; the sync then copies without it
            logger.debug("no boundary after the training failed", exc_info=True)

    def _bound_the_stop(self) -> None:
        """From now on a stop could lose training, so it may take as long as the drain."""

        def last_words() -> tuple[str, int]:
            try:
                said = outcomes(self._members, self._settings.drain_s)
                return "\n".join(self._named(expert, sentence) for expert, sentence in said.items()), 0
            except FedMoEError as error:
                return str(error), error.exit_code

        self._stop.patience_s, self._stop.end_s = self._settings.drain_s + LEAVE_S, END_S
        syncs = [member.sync for member in self._members.values()]
        self._stop.when_asked += [partial(sync.finish, self._settings.drain_s) for sync in syncs]
        self._stop.is_saving = lambda: any(sync.is_saving for sync in syncs)
        self._stop.last_words = last_words

    def _epochs(self, turn: Turn) -> float:
        return float(turn.trainer.position / self._n_examples)

    def _has_done_enough(self) -> bool:
        """True after `max_steps` steps over all experts, or once each was trained for `max_epochs` epochs.

        Steps that were dropped do not count, because the rows are trained on again.
        """
        settings = self._settings
        steps = sum(turn.progress.steps - turn.member.exchange.dropped for turn in self._turns)
        epochs = min(map(self._epochs, self._next), default=0.0)
        is_done = bool(
            (settings.max_steps and steps >= settings.max_steps)
            or (settings.max_epochs and epochs >= settings.max_epochs)
        )
        for member in self._members.values():
            member.is_done = is_done
        return is_done


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
