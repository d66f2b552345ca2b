"""A worker: pull the expert, fine-tune on private rows, publish what was learned, for ever.

The main thread trains; the sync thread (producers/sync.py) does all the talking, so training never waits for Redis.
"""

import logging
import secrets
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fedmoe.data.bad_rows import BadRows
from fedmoe.data.jsonl import DataFile, open_data
from fedmoe.errors import (
    NameTakenError,
    RedisUnavailableError,
    RefusedError,
    SettingsError,
    StoppedError,
)
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import make_run
from fedmoe.settings import WorkerSettings
from fedmoe.store.connection import Connection, RedisSettings
from fedmoe.store.worker import WorkerStore
from fedmoe.util.stopping import Stop
from fedmoe.util.text import printable_lines
from producers.checkpoint import StateDir, name_in
from producers.claim import claim_name
from producers.exchange import Exchange
from producers.heartbeat import HEARTBEAT_INTERVAL_S
from producers.join import Joining
from producers.ledger import Ledger, Trained
from producers.material import Material, prepare
from producers.pull import pull
from producers.sync import Sync
from producers.trainer import TOO_LARGE
from producers.training import Progress, Training

logger = logging.getLogger(__name__)


class Worker:
    """One worker from start to end.

    Args:
        report: where lines for people go.
        stop: set it, and the worker finishes its step, publishes, waits for the decision and returns. It is set, too,
            when the worker has trained as much as it shall.
    """

    def __init__(
        self,
        redis: RedisSettings,
        settings: WorkerSettings,
        *,
        stop: Stop,
        report: Callable[[str], None] = print,
    ) -> None:
        self._settings, self._why = settings, "--name"
        if not settings.name:
            self._settings, self._why = _named(settings)
        settings = self._settings
        self._stop = stop
        self._print = report
        self._store = WorkerStore(Connection(redis), settings.stream, settings.worker)
        self._mute = False
        self._has_joined = False
        self._is_done = False  # has trained as much as it was asked to
        self._joining = Joining(self._store, wait=settings.wait, stop=stop)

    def _report(self, line: str) -> None:
        """Print a line; a full disk or a reader that has gone must not end the training."""
        try:
            self._print(printable_lines(line))
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
        stop.last_words = lambda: ("stopped before the training began: nothing was trained yet", 0)
        stop.when_out_of_patience.append(self._store.connection.cut_off)
        how, reason = "failed", ""
        try:
            self._run()
            how = "finished" if self._is_done else "stopped"
        except StoppedError as stopped:
            how = "stopped"
            self._report(str(stopped))
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
        self._report(f"worker {settings.worker!r} of expert {settings.stream!r} (name from {self._why})")
        bad_rows = BadRows(report=self._report, file=settings.bad_rows, fail=settings.on_bad_row == "fail")
        data = open_data(settings.data, bad_rows, stopped=self._stop.is_set)
        with closing(StateDir(settings.state_dir)) if settings.state_dir else nullcontext() as state_dir:
            self._work(state_dir, data, bad_rows)

    def _work(self, state_dir: StateDir | None, data: DataFile, bad_rows: BadRows) -> None:
        settings = self._settings
        self._joining.check_rights()
        spec = self._joining.spec()
        material = self._prepare(spec, data, bad_rows, state_dir)
        self._joining.check_base(material.identity)
        state_id = state_dir.id if state_dir else ""
        patience_s = HEARTBEAT_INTERVAL_S * 1.5
        claim = partial(claim_name, self._store, state_id=state_id, patience_s=patience_s, stop=self._stop)
        self._joining.patiently(claim)
        self._has_joined = True
        self._joining.pin_base(material.identity, state_id=state_id)
        trainer = material.make_trainer()
        ledger, trained = self._open_books(state_dir, trainer, spec, material.data)
        rules = ledger.meta.rules
        trainer.adopt(rules.training)  # until the next pull
        if not ledger.seq and rules.training.max_length != material.max_length:
            logger.info(
                "rows are truncated to %d tokens; the rules in force say %d, which takes effect at the next start",
                material.max_length,
                rules.training.max_length,
            )
        progress = Progress()
        exchange = Exchange(trainer, with_optimizer=state_dir is not None, trained=trained)
        sync = Sync(
            self._store, ledger, exchange, spec,
            identity=material.identity, state_dir=state_dir, data=material.data, training_fields=progress.fields,
            max_length=material.max_length, must_pull=bool(ledger.seq),
            checkpoint_interval_s=settings.checkpoint_interval_s,
        )  # fmt: skip
        training = Training(
            trainer, exchange, sync, settings,
            progress=progress, n_examples=material.n_examples, stop=self._stop, report=self._report,
        )  # fmt: skip
        training.run()
        self._is_done = training.is_done

    def _prepare(self, spec: Spec, data: DataFile, bad_rows: BadRows, state_dir: StateDir | None) -> Material:
        return prepare(
            self._settings, spec, self._joining.meta(), data, bad_rows,
            cache=state_dir.path if state_dir else None, stopped=self._stop.is_set, report=self._report,
        )  # fmt: skip

    def _open_books(
        self, state_dir: StateDir | None, trainer: Any, spec: Spec, data: str
    ) -> tuple[Ledger, Trained | None]:
        """The ledger of the checkpoint if there is one, else a new run on the expert's present weights."""
        settings = self._settings
        saved = (
            state_dir.load(expert=settings.stream, worker=settings.worker, spec=spec, now=time.monotonic())
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
            state = dict(saved.optimizer)
            if saved.data == data:
                trainer.position = saved.position
            else:
                self._report(
                    f"the examples of {settings.data} differ from those of the checkpoint (other file, chat template, "
                    "--learn or max_length): starting at the first one"
                )
                state.pop(TOO_LARGE, None)
            trainer.load_state(state)
            self._report(
                f"resuming run {saved.ledger.run} after update {saved.ledger.seq}, example {trainer.position}"
            )
            return saved.ledger, saved.trained
        # Before the pull: an update of an earlier run that is decided after it then is of an earlier incarnation.
        incarnation = self._joining.patiently(self._store.next_incarnation)
        pulled = self._joining.patiently(lambda: pull(self._store, spec, known=""))
        base = pulled.weights
        if base is None:
            raise RefusedError(f"expert {settings.stream!r} was just created again: start this worker again")
        with torch.no_grad():
            trainer.flat.copy_(base)
        start = pulled.decided.id if pulled.decided else None
        run = make_run(max(incarnation, start.incarnation + 1 if start else 1), secrets.token_hex(4))
        return Ledger(base=base, packed=pulled.packed, meta=pulled.meta, run=run, start=start), None


def _named(settings: WorkerSettings) -> tuple[WorkerSettings, str]:
    """Settings with a name, and why this one: a restart on the same state directory goes on under the same name."""
    if settings.state_dir and (name := name_in(settings.state_dir)):
        why = f"the checkpoint in {settings.state_dir}"
        if name != settings.worker:
            why += f", not this host, {settings.worker!r}; for another worker give --name and another --state-dir"
        return replace(settings, name=name), why
    return replace(settings, name=settings.worker), "this host; --name gives another one"
