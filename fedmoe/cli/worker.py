"""`fedmoe worker run`."""

from typing import TYPE_CHECKING, Any

import click

from fedmoe.cli.declared import made, options, redis_options
from fedmoe.settings import RedisSettings, WorkerSettings
from fedmoe.util.alive import AliveSettings, alive

if TYPE_CHECKING:
    from fedmoe.util.stopping import Stop


@click.group()
def worker() -> None:
    """Fine-tune an expert on private data."""


@worker.command()
@redis_options
@options(WorkerSettings)
@options(AliveSettings)
def run(redis: RedisSettings, **values: Any) -> None:
    """Train and publish until stopped; after SIGTERM, SIGHUP or Ctrl-C, publish the last progress, then end.

    Rows are {"prompt", "completion"} or {"messages": […]}; only the answers count in the loss.
    """
    from fedmoe.util.stopping import Stop, stop_on_signals

    file = made(AliveSettings, values).alive_file
    with stop_on_signals(stop := Stop()), alive(file, "worker"):
        _run(stop, redis, made(WorkerSettings, values))


def _run(stop: "Stop", redis: RedisSettings, settings: WorkerSettings) -> None:
    from fedmoe.util.memory import keep_freed
    from producers.worker import Worker

    keep_freed(blocks_mib=32, free_mib=64)  # each sync allocates and frees copies of the adapter
    Worker(redis, settings, stop=stop, report=click.echo).run()
