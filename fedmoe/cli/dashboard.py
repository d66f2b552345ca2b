"""`fedmoe dashboard`."""

from typing import TYPE_CHECKING, Any

import click

from fedmoe.cli.declared import made, options, redis_options
from fedmoe.cli.logs import log_options
from fedmoe.settings import RedisSettings
from fedmoe.tools.dashboard.settings import DashboardSettings

if TYPE_CHECKING:
    from fedmoe.util.stopping import Stop


@click.command()
@redis_options
@options(DashboardSettings)
@log_options
def dashboard(redis: RedisSettings, **values: Any) -> None:
    """Show experts, workers, gateway and Redis in a browser; it only reads, so a monitoring user may run it.

    The same is there as JSON, described by /api/openapi.json. Other machines may ask only with a password.
    """
    from fedmoe.util.stopping import Stop, stop_on_signals

    with stop_on_signals(stop := Stop()):
        _run(stop, redis, made(DashboardSettings, values))


def _run(stop: "Stop", redis: RedisSettings, settings: DashboardSettings) -> None:
    import logging
    import os
    import ssl

    from fedmoe.errors import RedisUnavailableError, RedisUnfitError, SettingsError
    from fedmoe.tools.dashboard.settings import password_of
    from fedmoe.util.log import say

    try:
        from fedmoe.tools.dashboard.app import Dashboard
        from fedmoe.tools.dashboard.scrape import metrics_routes
        from fedmoe.tools.dashboard.watcher import Watcher
        from fedmoe.tools.http_server import HttpServer
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"the dashboard needs {error.name}: install it with the extra `dashboard` (pip install "
            "'fedmoe[dashboard]')",
            about="dashboard",
        ) from error

    logger = logging.getLogger(__name__)
    stop.last_words = lambda: ("stopped", 0)
    password = password_of(settings, os.environ)
    watcher = Watcher(redis, interval_s=settings.interval_s)
    stop.when_asked.append(watcher.connection.cut_off)
    try:
        watcher.look()
    except RedisUnfitError:
        raise
    except RedisUnavailableError as error:
        logger.warning("%s; the dashboard tries again", error)
    board = Dashboard(watcher, settings, redis, password=password, more=metrics_routes(redis))
    try:
        server = HttpServer(
            board.app,
            settings.host,
            settings.port,
            certificate=settings.tls_certificate,
            key=settings.tls_key,
            proxies=settings.forwarded_allow_ips,
        )
    except ssl.SSLError as error:
        raise SettingsError(
            f"certificate {settings.tls_certificate} and its key cannot be used ({error.reason or error}): give PEM "
            "files that belong together",
            about="tls_certificate",
        ) from error
    except FileNotFoundError as error:
        raise SettingsError(
            f"cannot read {settings.tls_certificate} or {settings.tls_key or 'its key'}: {error.strerror}",
            about="tls_certificate",
        ) from error
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror or error}): choose another --port or "
            "--host",
            about="port",
        ) from error
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    scheme = "https" if settings.tls_certificate else "http"
    say(f"dashboard on {scheme}://{shown}:{server.port}")
    if not settings.is_local and not settings.tls_certificate:
        logger.warning(
            "passwords travel unencrypted: give --tls-certificate, or let a proxy with TLS stand before it"
        )
    stop.when_asked += [board.hub.close, server.stop]
    watcher.run(stop)
    server.join()
