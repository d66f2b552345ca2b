"""The coordinator of the architecture document, which FedMoE replaces: HTTP, torch.save bodies, a lock in one process.

This is the baseline of that document: `POST /update` carries an adapter's delta as torch.save wrote it, the
coordinator loads it (weights_only, so that nothing is run) and adds it to its weights under a lock; `GET /weights`
answers with the weights as torch.save writes them. As drawn there, a named tensor for each of the adapter's, which is
most of what it costs: torch.save and torch.load take their time by tensors (420 here) more than by bytes. Else written
well: one thread a connection, kept alive, no framework, no copy of bodies that can be spared.
"""

import http.client
import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from fedmoe.protocol.layout import Layout
from fedmoe.protocol.lora_init import initial_weights
from ops.bench.contest import Contestant, Seats
from ops.bench.processes import BenchError, free_port


def _named(layout: Layout, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of their own, as a state dict has them."""
    return {name: view.clone() for name, view in layout.views(flat).items()}


def _save(tensors: dict[str, torch.Tensor]) -> memoryview:
    body = io.BytesIO()
    torch.save(tensors, body)
    return body.getbuffer()


def coordinator(port: int, layout: Layout) -> None:
    """Body of the coordinator's process."""
    weights = _named(layout, initial_weights(layout, 0))
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections alive
        disable_nagle_algorithm = True

        def _answer(self, body: memoryview | bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            body = io.BytesIO(self.rfile.read(int(self.headers["Content-Length"])))
            delta = torch.load(body, weights_only=True)  # the contestant's way; runs no code of the sender
            with lock:
                for name, tensor in weights.items():
                    tensor.add_(delta[name])
            self._answer(b"")

        def do_GET(self) -> None:
            with lock:
                body = _save(weights)
            self._answer(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # http.server's name
            """Say nothing."""

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def _request(
    connection: http.client.HTTPConnection, method: str, path: str, body: memoryview | None
) -> bytes:
    headers = {} if body is None else {"Content-Length": str(len(body))}
    connection.request(method, path, body=body, headers=headers)
    response = connection.getresponse()
    answer = response.read()
    if response.status != 200:
        raise BenchError(f"{method} {path} was answered with {response.status} {response.reason}")
    return answer


def client(seats: Seats, index: int, port: int, layout: Layout) -> None:
    """Body of a client process: push, pull, load, again."""
    step = _named(layout, torch.randn(layout.numel, generator=torch.Generator().manual_seed(0)) * 1e-4)
    connection = http.client.HTTPConnection("127.0.0.1", port, blocksize=1 << 20)
    for _ in range(200):
        try:
            connection.connect()
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    while True:
        seats.wait_for_go(index)
        began = time.monotonic()
        _request(connection, "POST", "/update", _save(step))
        body = io.BytesIO(_request(connection, "GET", "/weights", None))
        torch.load(body, weights_only=True)  # the contestant's way, as above
        seats.count(index, time.monotonic() - began)


class Http(Contestant):
    """Three clients and the coordinator."""

    def __init__(self, name: str, layout: Layout) -> None:
        super().__init__(name)
        self.layout = layout

    def _start(self) -> None:
        port = free_port()
        self.processes.call("coordinator", coordinator, port, self.layout)
        for index in range(self.n_clients):
            self.processes.call("clients", client, self.seats, index, port, self.layout)
