"""Serves an ASGI application from a thread; needs uvicorn (extras `serve` and `dashboard`)."""

import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import uvicorn

MAX_CONNECTIONS = 1000  # further clients get status 503


class HttpServer:
    """Serves an application until `stop` is called, in a thread of its own.

    Args:
        app: the ASGI application.
        host: address to listen on.
        port: to listen on; 0 takes a free one.
        certificate, key: PEM files for TLS; None for plain HTTP.

    Raises:
        OSError: if the address is taken or is not this machine's.
        ssl.SSLError: if certificate and key cannot be used.
    """

    def __init__(
        self, app: Any, host: str, port: int, *, certificate: Path | None = None, key: Path | None = None
    ) -> None:
        if certificate:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                certificate, key
            )  # uvicorn's thread is too late
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family)  # uvicorn's own way ends the process
        config = uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, lifespan="off", server_header=False,
            timeout_graceful_shutdown=1, limit_concurrency=MAX_CONNECTIONS, proxy_headers=False,
            ssl_certfile=certificate, ssl_keyfile=key,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self.port = int(self._socket.getsockname()[1])
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="http", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop within a second."""
        self._server.should_exit = True

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join()
        self._socket.close()
