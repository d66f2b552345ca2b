"""A worker: pull the expert, fine-tune on private rows, publish what was learned, for ever.

The main thread trains; the sync thread (producers/sync.py) does all the talking, so training never waits for Redis.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fedmoe.data.bad_rows import BadRows
from fedmoe.data.jsonl import DataFile, open_data
from fedmoe.errors import (
    FedMoEError,
    NameTakenError,
    RedisUnavailableError,
    RefusedError,
    SettingsError,
    StoppedError,
)
from fedmoe.spec import Spec
from fedmoe.stopping import Stop
from fedmoe.store.connection import Connection, RedisSettings
from fedmoe.store.worker import WorkerStore
from fedmoe.text import printable
from fedmoe.update import make_run
from producers.checkpoint import StateDir, name_in
from producers.claim import claim_name
from producers.exchange import Exchange
from producers.join import Joining
from producers.ledger import Ledger, Trained
from producers.material import Material, prepare
from producers.settings import WorkerSettings
from producers.sync import HEARTBEAT_INTERVAL_S, Sync
from producers.trainer import StepResult

logger = logging.getLogger(__name__)

END_S = 4.0  # after the drain, in which the last checkpoint is written; then the process ends in any case


class Worker:
    """One worker from start to end.

    Args:
        say: where lines for people go.
        stop: set it, and the worker finishes its step, publishes, waits for the decision and returns. It is set, too,
            when the worker has trained as much as it shall.
    """

    def __init__(
        self,
        redis: RedisSettings,
        settings: WorkerSettings,
        *,
        stop: Stop,
        say: Callable[[str], None] = print,
    ) -> None:
        self._settings, self._why = settings, "--name"
        if not settings.name:
            self._settings, self._why = _named(settings)
        settings = self._settings
        self._stop = stop
        self._print = say
        self._store = WorkerStore(Connection(redis), settings.stream, settings.worker)
        self._mute = False
        self._has_joined = False
        self._is_done = False  # has trained as much as it was asked to
        self._joining = Joining(self._store, wait=settings.wait, stop=stop)
        self._last: StepResult | None = None
        self._steps = 0
        self._tokens_per_s = 0.0

    def _say(self, line: str) -> None:
        """Print a line; a full disk or a reader that has gone must not end the training."""
        try:
            self._print(printable(line))
        except OSError as error:
            if not self._mute:
                logger.warning(
                    "progress cannot be printed any more (%s); training on", error.strerror or error
                )
            self._mute = True

    def run(self) -> None:
        """Join, train and publish until stopped.

        Raises:
            FedMoEError: one sentence for whatever makes this worker useless: wrong data, stream, base model, name.
        """
        stop = self._stop
        stop.last_words = lambda: ("stopped before it had joined: nothing was trained yet", 0)
        stop.when_out_of_patience.append(self._store.connection.cut_off)
        how, reason = "failed", ""
        try:
            self._run()
            how = "finished" if self._is_done else "stopped"
        except StoppedError as stopped:
            how = "stopped"
            self._say(str(stopped))
        except NameTakenError:
            self._has_joined = False  # what is there under this name is another's
            raise
        except BaseException as error:
            how, reason = (
                "refused" if isinstance(error, RefusedError) else "failed",
                str(error) or repr(error),
            )
            raise
        finally:
            if self._has_joined:
                self._take_leave(how, reason)

    def _take_leave(self, how: str, reason: str) -> None:
        """Take the heartbeat away, and leave word how it ended, for `fedmoe status`."""
        try:
            self._store.leave(how, reason)
        except RedisUnavailableError:
            logger.debug("the heartbeat could not be taken away, it expires by itself")

    def _run(self) -> None:
        settings = self._settings
        self._say(f"worker {settings.worker!r} of expert {settings.stream!r} (name: {self._why})")
        bad_rows = BadRows(say=self._say, file=settings.bad_rows, fail=settings.on_bad_row == "fail")
        data = open_data(settings.data, bad_rows, stopped=self._stop.is_set)
        state_dir = StateDir(settings.state_dir) if settings.state_dir else None
        spec = self._joining.spec()
        material = self._prepare(spec, data, bad_rows, state_dir)
        self._joining.check_base(material.base)
        state_id = state_dir.id if state_dir else ""
        patience_s = HEARTBEAT_INTERVAL_S * 1.5
        claim = partial(claim_name, self._store, state_id=state_id, patience_s=patience_s, stop=self._stop)
        self._joining.patiently(claim)
        self._has_joined = True
        self._joining.pin_base(material.base, state_id=state_id)
        trainer = material.make_trainer()
        ledger, trained = self._open_books(state_dir, trainer, spec, material.data)
        exchange = Exchange(trainer, with_optimizer=state_dir is not None, trained=trained)
        sync = Sync(
            self._store, ledger, exchange, spec,
            base=material.base, state_dir=state_dir, data=material.data, report=self._report,
            must_pull=bool(ledger.seq),
        )  # fmt: skip
        self._train(trainer, exchange, sync, material.n_examples)

    def _prepare(self, spec: Spec, data: DataFile, bad_rows: BadRows, state_dir: StateDir | None) -> Material:
        return prepare(
            self._settings, spec, self._joining.meta(), data, bad_rows,
            cache=state_dir.path if state_dir else None, stopped=self._stop.is_set, say=self._say,
        )  # fmt: skip

    def _open_books(
        self, state_dir: StateDir | None, trainer: Any, spec: Spec, data: str
    ) -> tuple[Ledger, Trained | None]:
        """The ledger of the checkpoint if there is one, else a new run on the expert's present weights."""
        settings = self._settings
        saved = (
            state_dir.load(expert=settings.stream, worker=settings.worker, now=time.monotonic())
            if state_dir
            else None
        )
        if saved is not None:
            if saved.local.shape != trainer.flat.shape:
                raise SettingsError(
                    f"the checkpoint in {settings.state_dir} is of an adapter of {saved.local.numel()} values, the "
                    f"expert's has {trainer.flat.numel()}: move it away to start a new run"
                )
            trainer.flat.copy_(saved.local)
            trainer.load_state(dict(saved.optimizer))
            if saved.data == data:
                trainer.position = saved.position
            else:
                self._say(
                    f"{settings.data} does not give the examples of the checkpoint (the file, the chat template, "
                    "--learn or the expert's max_length is another): starting at the first one"
                )
            self._say(
                f"resuming run {saved.ledger.run} after update {saved.ledger.seq}, example {trainer.position}"
            )
            return saved.ledger, saved.trained
        # Before the pull: an update of an earlier run that is decided after it then is of an earlier epoch.
        epoch = self._joining.patiently(self._store.next_epoch)
        snapshot = self._joining.patiently(lambda: self._store.pull(spec, known=""))
        base = snapshot.weights
        if base is None:
            raise RefusedError(f"expert {settings.stream!r} was just made anew: start this worker again")
        with torch.no_grad():
            trainer.flat.copy_(base)
        start = snapshot.decided.id if snapshot.decided else None
        run = make_run(max(epoch, start.epoch + 1 if start else 1), secrets.token_hex(4))
        return Ledger(base=base, meta=snapshot.meta, run=run, start=start), None

    def _train(self, trainer: Any, exchange: Exchange, sync: Sync, n_examples: int) -> None:
        """Train until stopped or done, then let the sync publish the rest."""
        thread = threading.Thread(target=sync.run, name="sync", daemon=True)
        self._prepare_stop(sync, exchange)
        thread.start()
        rate = _Rate()
        said_at = time.monotonic()
        while not self._stop.is_set() and thread.is_alive() and not self._done(trainer, n_examples):
            exchange.boundary()
            computed = trainer.compute()
            step: StepResult | None = exchange.take_step(partial(trainer.apply, computed))
            if step is None:
                break
            self._last = step
            self._steps += 1
            self._tokens_per_s = rate.add(step.n_tokens)
            if time.monotonic() - said_at >= self._settings.log_interval_s:
                said_at = time.monotonic()
                self._say(self._progress(sync))
        self._stop.set()
        if self._last:
            self._say(self._progress(sync))
        sync.finish(self._settings.drain_s)
        while thread.is_alive():
            exchange.boundary()
            thread.join(0.02)
        self._say(self._outcome(sync, exchange))

    def _prepare_stop(self, sync: Sync, exchange: Exchange) -> None:
        """From now on there is something to lose: a stop may take as long as the drain."""

        def last_words() -> tuple[str, int]:
            try:
                return self._outcome(sync, exchange), 0
            except FedMoEError as error:
                return str(error), error.exit_code

        stop = self._stop
        stop.patience_s, stop.end_s = self._settings.drain_s, END_S
        stop.when_asked.append(lambda: sync.finish(self._settings.drain_s))
        stop.is_saving = lambda: sync.is_saving
        stop.last_words = last_words

    def _done(self, trainer: Any, n_examples: int) -> bool:
        settings = self._settings
        epochs = trainer.position / n_examples
        self._is_done = bool(
            (settings.max_steps and self._steps >= settings.max_steps)
            or (settings.max_epochs and epochs >= settings.max_epochs)
        )
        return self._is_done

    def _outcome(self, sync: Sync, exchange: Exchange) -> str:
        """How it ended, as a sentence; raise if something that was trained is lost."""
        if sync.failure is not None:
            raise sync.failure
        settings, status = self._settings, sync.status
        told = (
            f"{status.applied} updates applied, {status.refused} refused, expert at version {status.version}"
        )
        if not sync.ledger.queue and not exchange.steps_left:
            return f"done: {told}"
        if sync.saved:
            return f"done: {told}; what is not decided yet is kept in {settings.state_dir}"
        if sync.in_redis and not exchange.steps_left:
            return f"done: {told}; the last one waits in Redis for an aggregator"
        kept = "waits in Redis, but" if sync.in_redis else "is not in Redis, and"
        remedy = "a --state-dir that can be written keeps all"
        if settings.state_dir:
            kept = f"is as the last checkpoint in {settings.state_dir} has it, and at most"
            remedy = "start this worker again to go on from there"
        raise FedMoEError(
            f"{told}; the last update {kept} {exchange.steps_left} steps trained since are lost: nobody decided it "
            f"within {settings.drain_s:g} s ({status.problem or 'is an aggregator running?'}); {remedy}"
        )

    def _progress(self, sync: Sync) -> str:
        status, last = sync.status, self._last
        assert last is not None
        flight = f"in flight {status.in_flight}" if status.in_flight else "in flight -"
        problem = f"  [{status.problem}]" if status.problem else ""
        return (
            f"step {self._steps}  loss {last.loss:.3f}  tokens/s {self._tokens_per_s:.0f}  "
            f"version {status.version}  staleness {status.staleness}  {flight}{problem}"
        )

    def _report(self) -> dict[str, str | int | float]:
        loss = f"{self._last.loss:.4f}" if self._last else ""
        return {"step": self._steps, "loss": loss, "tokens_per_s": f"{self._tokens_per_s:.1f}"}


def _named(settings: WorkerSettings) -> tuple[WorkerSettings, str]:
    """Settings with a name, and why this one: a restart on the same state directory goes on under the same name."""
    if settings.state_dir and (name := name_in(settings.state_dir)):
        why = f"that of the checkpoint in {settings.state_dir}"
        if name != settings.worker:
            why += f", not this host's {settings.worker!r}; for another worker give --name and another --state-dir"
        return replace(settings, name=name), why
    return replace(settings, name=settings.worker), "this host's; --name gives another one"


class _Rate:
    """Tokens per second, averaged over about the last ten steps."""

    def __init__(self) -> None:
        self._at = time.monotonic()
        self._rate = 0.0

    def add(self, n_tokens: int) -> float:
        now = time.monotonic()
        fresh = n_tokens / max(now - self._at, 1e-6)
        self._at = now
        self._rate = fresh if self._rate == 0 else 0.9 * self._rate + 0.1 * fresh
        return self._rate
