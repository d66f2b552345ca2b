"""`fedmoe worker run`; who may be one: `fedmoe worker enrol | revoke | list`."""

from typing import TYPE_CHECKING, Any

import click

from fedmoe.cli.declared import made, options, redis_options
from fedmoe.cli.enrol import add_enrolment
from fedmoe.cli.logs import log_options
from fedmoe.settings import RedisSettings, WorkerSettings
from fedmoe.tools.metrics.settings import MetricsSettings, check_installed
from fedmoe.util.alive import AliveSettings, alive

if TYPE_CHECKING:
    from fedmoe.util.stopping import Stop


@click.group()
def worker() -> None:
    """Fine-tune an expert on private data."""


add_enrolment(worker, "worker")


@worker.command()
@redis_options
@options(WorkerSettings)
@options(AliveSettings)
@options(MetricsSettings)
@log_options
def run(redis: RedisSettings, **values: Any) -> None:
    """Train and publish until stopped; after SIGTERM, SIGHUP or Ctrl-C, publish the last progress, then end.

    Rows are {"prompt", "completion"} or {"messages": […]}; only the answers count in the loss.
    """
    from fedmoe.util.stopping import Stop, stop_on_signals

    _take_enrolment(redis, values)
    file = made(AliveSettings, values).alive_file
    with stop_on_signals(stop := Stop()), alive(file, "worker"):
        _run(stop, redis, made(WorkerSettings, values), made(MetricsSettings, values))


def _take_enrolment(redis: RedisSettings, values: dict[str, Any]) -> None:
    """Expert and name of the enrolment; others could not be used, as its user has no rights on them."""
    from fedmoe.errors import SettingsError

    if redis.enrolled is None or not redis.enrolled.role:
        return
    if not redis.enrolled.expert:
        raise SettingsError(
            f"the enrolment file {str(redis.enrolled.path)!r} is that of a {redis.enrolled.role}, who may not train: "
            "name one of the role worker",
            about="rights",
        )
    for option, enrolled in (("stream", redis.enrolled.expert), ("name", redis.enrolled.name)):
        if values[option] not in (None, enrolled):
            raise SettingsError(
                f"--{option} is {values[option]!r}, and the enrolment is for {enrolled!r}: leave --{option} out, or "
                "ask the operator for another enrolment",
                about=option,
            )
        values[option] = enrolled


def _run(stop: "Stop", redis: RedisSettings, settings: WorkerSettings, metrics: MetricsSettings) -> None:
    from fedmoe.util.log import say
    from fedmoe.util.memory import keep_freed
    from producers.worker import Worker

    keep_freed(blocks_mib=32, free_mib=64)  # each sync allocates and frees copies of the adapter
    worker = Worker(redis, settings, stop=stop, report=say)
    if metrics.port is not None:
        check_installed()
        from fedmoe.tools.metrics.server import serve_process
        from producers.metrics import WorkerCollector

        serve_process(metrics, WorkerCollector(worker, settings.state_dir))
    worker.run()
