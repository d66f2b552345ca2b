"""Serves `/metrics` over HTTP, in threads of its own.

A scrape reads what the process counts anyway, so neither training nor aggregating waits for it.
"""

import logging
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from fedmoe.errors import SettingsError
from fedmoe.tools.metrics.settings import MetricsSettings

logger = logging.getLogger(__name__)

REQUEST_S = 10.0  # for the request of a client


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class's name
        """A scrape is no news."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone, or says nothing, is no news either."""
        logger.debug("a scrape broke off", exc_info=True)


class MetricsServer:
    """Serves a registry at /metrics until `close` is called.

    Raises:
        SettingsError: if the address is taken or is not this machine's.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        self._app: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            server = type("_Server", (_Server,), {"address_family": family})
            self._server: WSGIServer = server(address[:2], _Handler)
        except OSError as error:
            raise SettingsError(
                f"metrics cannot be served on {host}:{port} ({error.strerror or error}): choose another port or "
                "host",
                about="metrics_port",
            ) from error
        self._server.set_app(self._answer)
        self.port = int(self._server.server_port)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/metrics":
            start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
            return [b"the metrics are at /metrics\n"]
        try:
            return self._app(
                environ | {"HTTP_ACCEPT": _understood(environ.get("HTTP_ACCEPT", ""))}, start_response
            )
        except Exception:  # a bug here must not end up as HTML, nor as raw lines in the log
            logger.exception("unexpected error while metrics were read")
            start_response("500 Internal Server Error", [("Content-Type", "text/plain; charset=utf-8")])
            return [b"unexpected error: see the log of this process\n"]

    def close(self) -> None:
        """End within a second."""
        self._server.shutdown()
        self._server.server_close()


def exposition(registry: CollectorRegistry, accept: str = "") -> tuple[bytes, str]:
    """The metrics as text, and its content type, in the form that the Accept header of a request asks for."""
    render, content_type = choose_encoder(_understood(accept))
    return render(registry), content_type


def _understood(accept: str) -> str:
    """An Accept header that `choose_encoder` can read; "" for one whose version is not made of numbers."""
    try:
        choose_encoder(accept)
    except (TypeError, ValueError):
        return ""
    return accept


def serve_process(settings: MetricsSettings, collector: Collector) -> MetricsServer:
    """Serve a collector's metrics and those of the process (memory, CPU, files); `settings` name a port."""
    assert settings.port is not None
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    server = MetricsServer(registry, settings.host, settings.port)
    logger.info("metrics are served on %s", server.url)
    return server
