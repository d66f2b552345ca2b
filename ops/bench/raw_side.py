"""What Redis itself can do with the same bytes: no decoding, no folding, no books, no checks.

Three clients write an update's parts (1 MiB) in one pipeline and ring the bell with XADD; a consumer reads what waits,
gets the parts, writes weights of the same size once for the batch, cleans up, and tells each client, which then gets
the weights. So as many bytes move in both directions as with FedMoE, and nobody ever waits for the next poll.
"""

import os
import time

from fedmoe.protocol.update import PART_BYTES
from fedmoe.settings import RedisSettings
from fedmoe.store.chunks import CHUNK_BYTES, put
from fedmoe.store.connection import Connection
from ops.bench.contest import Contestant, Seats

STREAM, GROUP, WEIGHTS = "updates", "aggregator", "weights"
BATCH = 64  # entries that one write of the weights takes at most, as FedMoE's default
BLOCK_MS = 500


def _redis(url: str):
    """The client that FedMoE uses, with its settings."""
    return Connection(RedisSettings(url=url)).client


def client(seats: Seats, index: int, url: str, n_bytes: int, in_chunks: bool) -> None:
    """Body of a client process."""
    redis = _redis(url)
    block = os.urandom(n_bytes)
    parts = [block[first : first + PART_BYTES] for first in range(0, n_bytes, PART_BYTES)]
    number = 0
    while True:
        seats.wait_for_go(index)
        began, number = time.monotonic(), number + 1
        with redis.pipeline(transaction=False) as pipe:
            for place, part in enumerate(parts):
                pipe.set(f"payload:{index}:{number}:{place}", part)
            pipe.xadd(STREAM, {"client": index, "number": number, "parts": len(parts)})
            pipe.execute()
        while redis.blpop([f"done:{index}"], timeout=1) is None:
            pass
        if in_chunks:
            with redis.pipeline(transaction=True) as pipe:
                for first in range(0, n_bytes, CHUNK_BYTES):
                    pipe.getrange(WEIGHTS, first, first + CHUNK_BYTES - 1)
                whole = sum(map(len, pipe.execute()))
        else:
            whole = len(redis.get(WEIGHTS))
        if whole != n_bytes:
            raise ValueError("the weights are not whole")
        seats.count(index, time.monotonic() - began)


def consumer(url: str, n_bytes: int, in_chunks: bool) -> None:
    """Body of the consumer's process."""
    redis = _redis(url)
    weights = memoryview(os.urandom(n_bytes))
    while True:
        reply = redis.xreadgroup(GROUP, "consumer", {STREAM: ">"}, count=BATCH, block=BLOCK_MS)
        entries = [entry for _, page in reply or () for entry in page]
        if not entries:
            continue
        keys, clients = [], []
        for _, fields in entries:
            who, number, parts = (int(fields[name]) for name in (b"client", b"number", b"parts"))
            clients.append(who)
            keys += [f"payload:{who}:{number}:{place}" for place in range(parts)]
        with redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.get(key)
            if sum(map(len, pipe.execute())) != n_bytes * len(entries):
                raise ValueError("an update is not whole")
        ids = [entry_id for entry_id, _ in entries]
        with redis.pipeline(transaction=True) as pipe:
            put(pipe, WEIGHTS, weights, present=n_bytes if in_chunks else 0)
            pipe.xack(STREAM, GROUP, *ids)
            pipe.xdel(STREAM, *ids)
            pipe.unlink(*keys)
            for who in clients:
                pipe.rpush(f"done:{who}", 1)
            pipe.execute()


class Raw(Contestant):
    """Three clients and a consumer over one Redis; n_bytes is the size of an update and of the weights.

    The weights are SET and GET as a whole, or `in_chunks`, see fedmoe/store/chunks.py.
    """

    def __init__(self, name: str, n_bytes: int, *, aof: bool = False, in_chunks: bool = False) -> None:
        super().__init__(name)
        self.n_bytes = n_bytes
        self.in_chunks = in_chunks
        self.aof = aof

    def _start(self) -> None:
        url = self.processes.redis(aof=self.aof)
        redis = _redis(url)
        redis.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        redis.set(WEIGHTS, bytes(self.n_bytes))
        redis.close()
        self.processes.call("consumer", consumer, url, self.n_bytes, self.in_chunks)
        for index in range(self.n_clients):
            self.processes.call("clients", client, self.seats, index, url, self.n_bytes, self.in_chunks)
