"""The worker of `fedmoe worker run`: prepare base model and rows, join by a `Membership`, train until stopped.

The main thread trains; the sync thread (producers/sync.py) talks to Redis, so training never waits for it.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

from fedmoe.data.bad_rows import BadRows
from fedmoe.data.jsonl import DataFile, open_data
from fedmoe.errors import StoppedError
from fedmoe.settings import RedisSettings, WorkerSettings
from fedmoe.util.stopping import Stop
from fedmoe.util.text import printable_lines
from producers.checkpoint import StateDir, name_in
from producers.material import Material, prepare
from producers.membership import Membership
from producers.training import Progress, Training

logger = logging.getLogger(__name__)


class Worker:
    """One worker from start to end.

    Args:
        report: prints a line for people.
        stop: once it is set, the worker finishes its step, publishes, waits for the decision and returns. The worker
            also sets it when it has trained as many steps or epochs as the settings say.
        prepare: loads the model and encodes the examples, as spec and settings say.
    """

    def __init__(
        self,
        redis: RedisSettings,
        settings: WorkerSettings,
        *,
        stop: Stop,
        report: Callable[[str], None] = print,
        prepare: Callable[..., Material] = prepare,
    ) -> None:
        self._redis = redis
        self._settings, self._why = (settings, "--name") if settings.name else with_name(settings)
        self._stop = stop
        self._print = report
        self._prepare = prepare
        self._mute = False

    def _report(self, line: str) -> None:
        """Print a line; a full disk or a closed pipe must not end the training."""
        try:
            self._print(printable_lines(line))
        except OSError as error:
            if not self._mute:
                logger.warning(
                    "progress cannot be printed any more (%s); training goes on", error.strerror or error
                )
            self._mute = True

    def run(self) -> None:
        """Join, train and publish until stopped.

        Raises:
            FedMoEError: one sentence, if this worker cannot train: wrong data, expert, base model or name.
        """
        settings, stop = self._settings, self._stop
        stop.last_words = lambda: ("stopped before the training began: nothing was trained yet", 0)
        self._report(f"worker {settings.worker!r} of expert {settings.stream!r} (name from {self._why})")
        bad_rows = BadRows(report=self._report, file=settings.bad_rows, fail=settings.on_bad_row == "fail")
        try:
            data = open_data(settings.data, bad_rows, stopped=stop.is_set)
            with Membership(
                self._redis, settings.stream, settings.worker,
                state_dir=StateDir(settings.state_dir) if settings.state_dir else None, wait=settings.wait, stop=stop,
                checkpoint_interval_s=settings.checkpoint_interval_s, report=self._report,
            ) as member:  # fmt: skip
                stop.when_out_of_patience.append(member.store.connection.cut_off)
                self._work(member, data, bad_rows)
        except StoppedError as stopped:
            self._report(str(stopped))

    def _work(self, member: Membership, data: DataFile, bad_rows: BadRows) -> None:
        settings = self._settings
        spec, meta = member.look()
        material = self._prepare(
            settings, spec, meta, data, bad_rows,
            cache=settings.state_dir, stopped=self._stop.is_set, report=self._report,
        )  # fmt: skip
        member.claim(material.identity)
        trainer, progress = material.make_trainer(), Progress()
        member.begin(
            trainer, data=material.data, source=str(settings.data),
            training_fields=progress.fields, max_length=material.max_length,
        )  # fmt: skip
        rules = member.sync.ledger.meta.rules
        if not member.sync.ledger.seq and rules.training.max_length != material.max_length:
            logger.info(
                "rows are truncated to %d tokens; max_length is now %d, which takes effect at the next start",
                material.max_length,
                rules.training.max_length,
            )
        Training(
            trainer, member, settings,
            progress=progress, n_examples=material.n_examples, stop=self._stop, report=self._report,
        ).run()  # fmt: skip


def with_name(settings: WorkerSettings) -> tuple[WorkerSettings, str]:
    """Settings with a name, and its source; a restart with the same state directory keeps the name."""
    if settings.state_dir and (name := name_in(settings.state_dir)):
        why = f"the checkpoint in {settings.state_dir}"
        if name != settings.worker:
            why += f", not this host, {settings.worker!r}; for another worker give --name and another --state-dir"
        return replace(settings, name=name), why
    return replace(settings, name=settings.worker), "this host; --name gives another one"
