"""`fedmoe worker run`."""

from typing import TYPE_CHECKING, Any

import click

from fedmoe.cli.declared import made, options, redis_options
from fedmoe.cli.logs import log_options
from fedmoe.settings import RedisSettings, WorkerSettings
from fedmoe.tools.metrics.settings import MetricsSettings, check_installed

if TYPE_CHECKING:
    from fedmoe.util.stopping import Stop


@click.group()
def worker() -> None:
    """Fine-tune an expert on private data."""


@worker.command()
@redis_options
@options(WorkerSettings)
@options(MetricsSettings)
@log_options
def run(redis: RedisSettings, **values: Any) -> None:
    """Train and publish until stopped; after SIGTERM, SIGHUP or Ctrl-C, publish the last progress, then end.

    Rows are {"prompt", "completion"} or {"messages": […]}; only the answers count in the loss.
    """
    from fedmoe.util.stopping import Stop, stop_on_signals

    with stop_on_signals(stop := Stop()):
        _run(stop, redis, made(WorkerSettings, values), made(MetricsSettings, values))


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
