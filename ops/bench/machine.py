"""What the machine allows: copying memory, and one TCP connection over loopback."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import torch

from fedmoe.layout import FLOAT_BYTES
from ops.bench.adapters import LAYOUTS
from ops.bench.contest import Contestant, Seats, take_turns
from ops.bench.plan import Plan
from ops.bench.processes import free_port
from ops.bench.result import Result, figure

BLOCK_BYTES = 1 << 20


def copy(seats: Seats, numel: int) -> None:
    """Body of a process that copies an adapter again and again."""
    source, target = torch.ones(numel), torch.zeros(numel)
    while True:
        seats.wait_for_go(0)
        target.copy_(source)
        seats.count(0)


def receive(port: int) -> None:
    """Body of a process that reads all it is sent."""
    with socket.create_server(("127.0.0.1", port)) as server:
        connection, _ = server.accept()
        block = bytearray(BLOCK_BYTES)
        while connection.recv_into(block):
            pass


def send(seats: Seats, port: int) -> None:
    """Body of a process that sends blocks of 1 MiB."""
    block = bytes(BLOCK_BYTES)
    connection = socket.socket()
    while connection.connect_ex(("127.0.0.1", port)):
        connection.close()
        connection = socket.socket()
    while True:
        seats.wait_for_go(0)
        connection.sendall(block)
        seats.count(0)


class Memcpy(Contestant):
    """One process, one thread."""

    def __init__(self, numel: int) -> None:
        super().__init__("memcpy", n_clients=1)
        self.numel = numel

    def _start(self) -> None:
        self.processes.call("clients", copy, self.seats, self.numel)


class Loopback(Contestant):
    """A sender and a receiver."""

    def __init__(self) -> None:
        super().__init__("loopback_tcp", n_clients=1)

    def _start(self) -> None:
        port = free_port()
        self.processes.call("receiver", receive, port)
        self.processes.call("clients", send, self.seats, port)


def run(plan: Plan) -> Iterator[Result]:
    """GB/s of each, one direction counted once."""
    numel = LAYOUTS[plan.size].numel
    contestants = [Memcpy(numel), Loopback()]
    with ExitStack() as stack:
        for contestant in contestants:
            stack.enter_context(contestant)
        samples = take_turns(contestants, rounds=plan.rounds, seconds=min(plan.seconds, 0.5))
    for name, n_bytes in (("memcpy", numel * FLOAT_BYTES), ("loopback_tcp", BLOCK_BYTES)):
        yield figure(f"{name}_gb_per_s", [turn.per_s * n_bytes / 1e9 for turn in samples[name]], "GB/s")
