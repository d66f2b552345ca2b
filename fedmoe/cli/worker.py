"""`fedmoe worker run`."""

from typing import TYPE_CHECKING, Any

import click

from fedmoe.cli.declared import made, options
from fedmoe.cli.options import redis_options, redis_settings
from fedmoe.settings import WorkerSettings

if TYPE_CHECKING:
    from fedmoe.util.stopping import Stop


@click.group()
def worker() -> None:
    """Fine-tune an expert on private data."""


@worker.command()
@redis_options
@options(WorkerSettings)
def run(**values: Any) -> None:
    """Train and publish until stopped; after SIGTERM, SIGHUP or Ctrl-C, publish what is trained, then end.

    Rows are {"prompt", "completion"} or {"messages": […]}; the loss is on the answers only.
    """
    from fedmoe.util.stopping import Stop, stop_on_signals

    with stop_on_signals(stop := Stop()):
        _run(stop, values)


def _run(stop: "Stop", values: dict[str, Any]) -> None:
    redis = redis_settings(values["redis"], values["prefix"], values["redis_timeout"])
    from fedmoe.util.memory import keep_freed
    from producers.worker import Worker

    keep_freed(blocks_mib=32, free_mib=64)  # copies of the adapter come and go with every sync
    Worker(redis, made(WorkerSettings, values), stop=stop, report=click.echo).run()
