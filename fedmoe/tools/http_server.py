"""Serves an ASGI application from a thread; needs uvicorn (extras `serve` and `dashboard`)."""

import asyncio
import socket
import ssl
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 1000  # further clients get status 503
REQUEST_S = 10.0  # for the head of a request; uvicorn itself waits for ever


class _Protocol(H11Protocol):
    """Closes a connection on which no whole head of a request comes, so that such ones do not use up all others."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()  # there is a request to answer
        elif self._late is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._late = self.loop.call_later(REQUEST_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def reserve(host: str, port: int) -> socket.socket:
    """A socket that is bound to this address, and takes no connections yet.

    Raises:
        OSError: if the address is taken or is not this machine's.
    """
    is_v6 = ":" in host
    reserved = socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_v6:
            reserved.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        reserved.bind((host, port))
    except OSError:
        reserved.close()
        raise
    return reserved


class HttpServer:
    """Serves an application until `stop` is called, in a thread of its own.

    Args:
        app: the ASGI application.
        host: address to listen on.
        port: to listen on; 0 takes a free one.
        certificate, key: PEM files for TLS; None for plain HTTP.
        proxies: addresses whose X-Forwarded-For and X-Forwarded-Proto are believed.
        reserved: from `reserve` with this address; None to do that now.

    Raises:
        OSError: if the address is taken or is not this machine's.
        ssl.SSLError: if certificate and key cannot be used.
    """

    def __init__(
        self,
        app: Any,
        host: str,
        port: int,
        *,
        certificate: Path | None = None,
        key: Path | None = None,
        proxies: Sequence[str] = (),
        reserved: socket.socket | None = None,
    ) -> None:
        if certificate:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                certificate, key
            )  # uvicorn's thread is too late
        self._socket = reserved or reserve(host, port)  # uvicorn's own way ends the process
        self._socket.listen()
        config = uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, lifespan="off", server_header=False,
            timeout_graceful_shutdown=1, limit_concurrency=MAX_CONNECTIONS, proxy_headers=bool(proxies),
            forwarded_allow_ips=list(proxies), ssl_certfile=certificate, ssl_keyfile=key, http=_Protocol,
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
