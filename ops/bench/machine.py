"""What the machine allows: copying memory, one TCP connection over loopback, and Redis with large values.

Writing a value over itself and reading it back, as a whole and in chunks: why weights travel in chunks.
"""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import torch

from fedmoe.protocol.layout import FLOAT_BYTES, AdapterBuffer, Layout, values_of, values_of_chunks
from fedmoe.settings import RedisSettings
from fedmoe.store.chunks import put, values_and_stamp, weights_reads
from fedmoe.store.connection import Connection
from fedmoe.store.full import read_together
from ops.bench.adapters import LAYOUTS
from ops.bench.contest import Contestant, Seats, take_turns
from ops.bench.plan import Plan
from ops.bench.processes import free_port
from ops.bench.result import Result, figure, ratio

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


def write_and_read(seats: Seats, url: str, layout: Layout, in_chunks: bool) -> None:
    """Body of a process that writes an adapter's file to one key, and reads it, again and again."""
    redis = Connection(RedisSettings(url=url)).client
    file = AdapterBuffer(layout).file
    redis.set("weights", file)
    while True:
        seats.wait_for_go(0)
        with redis.pipeline(transaction=True) as pipe:
            put(pipe, "weights", file, len(file) if in_chunks else 0)
            pipe.execute()
        if in_chunks:
            found = values_and_stamp(layout, read_together(redis, *weights_reads("weights", layout)))
            values_of_chunks(layout, found[0] if found else ())
        else:
            values_of(layout, redis.get("weights"))
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


class Values(Contestant):
    """A client and its Redis."""

    def __init__(self, name: str, layout: Layout, *, in_chunks: bool) -> None:
        super().__init__(name, n_clients=1)
        self.layout = layout
        self.in_chunks = in_chunks

    def _start(self) -> None:
        url = self.processes.redis()
        self.processes.call("clients", write_and_read, self.seats, url, self.layout, self.in_chunks)


def run(plan: Plan) -> Iterator[Result]:
    """GB/s of each, one direction counted once; CPU milliseconds of client and Redis to write and read an adapter."""
    layout = LAYOUTS[plan.size]
    numel = layout.numel
    whole = Values(f"redis_whole_{plan.size}", layout, in_chunks=False)
    chunks = Values(f"redis_chunks_{plan.size}", layout, in_chunks=True)
    contestants = [Memcpy(numel), Loopback(), whole, chunks]
    with ExitStack() as stack:
        for contestant in contestants:
            stack.enter_context(contestant)
        samples = take_turns(contestants, rounds=plan.rounds, seconds=min(plan.seconds, 0.5))
    for name, n_bytes in (("memcpy", numel * FLOAT_BYTES), ("loopback_tcp", BLOCK_BYTES)):
        yield figure(f"{name}_gb_per_s", [turn.per_s * n_bytes / 1e9 for turn in samples[name]], "GB/s")
    costs = {c.name: [turn.cpu_ms() for turn in samples[c.name]] for c in (whole, chunks)}
    for name, ms in costs.items():
        yield figure(f"{name}_cpu_ms", ms, "ms/write and read")
    yield ratio("redis_chunks_vs_whole_cpu", costs[chunks.name], costs[whole.name])
