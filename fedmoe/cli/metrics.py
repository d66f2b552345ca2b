"""`fedmoe metrics`: the federation as metrics for Prometheus."""

import click

from fedmoe.cli.declared import redis_options
from fedmoe.cli.logs import log_options
from fedmoe.settings import RedisSettings
from fedmoe.tools.metrics.settings import check_installed


@click.command()
@redis_options
@click.option("--host", default="127.0.0.1", show_default=True, metavar="TEXT",
              help="Address to listen on; 0.0.0.0 lets other machines read the metrics, too.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=9460, show_default=True, metavar="N",
              help="Port to listen on; 0 takes a free one.")  # fmt: skip
@click.option("--once", is_flag=True, help="Print the metrics of this moment, then end.")
@log_options
def metrics(redis: RedisSettings, host: str, port: int, once: bool) -> None:
    """Serve what `fedmoe status` shows at /metrics until stopped; it only reads, as any monitoring user may.

    Each scrape reads Redis. If Redis does not answer, the only metric is `fedmoe_redis_up 0`; --once then fails.
    """
    check_installed()
    from fedmoe.store.connection import Connection
    from fedmoe.store.inspect import Inspector
    from fedmoe.tools.metrics.federation import federation_registry
    from fedmoe.tools.metrics.server import MetricsServer, exposition
    from fedmoe.util.log import say
    from fedmoe.util.stopping import Stop, stop_on_signals

    connection = Connection(redis)
    inspector = Inspector(connection)
    if once:
        federation = inspector.federation()
        text, _ = exposition(federation_registry(lambda: federation))
        click.echo(text.decode(), nl=False)
        return
    registry = federation_registry(inspector.federation)
    with stop_on_signals(stop := Stop()):
        stop.last_words = lambda: ("stopped", 0)
        stop.when_asked.append(connection.cut_off)
        server = MetricsServer(registry, host, port)
        say(f"metrics are served on {server.url}")
        stop.wait()
        server.close()
