"""Encodes rows in several processes: with the same result as in one, in the same order, but sooner.

A process is a Python of its own that is started, not forked, because threads and a GPU may be at work in this one. It
gets the tokenizer and then one chunk of rows after the other; all that passes between the two is their own. It ends
when its pipe does, so none outlives this process, however that dies.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from fedmoe.data.bad_rows import Problem
from fedmoe.data.chat import Encoder
from fedmoe.data.encode import Encoded, Learn, encode_row
from fedmoe.data.records import Record
from fedmoe.errors import StoppedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

WORTH_BYTES = 8 * 2**20  # a process needs some seconds to start, in which this much is half encoded
MAX_PROCESSES = 16  # each holds a tokenizer, which is some 100 MiB
CHUNK_CHARS = 50_000  # some 0.1 s of work
WINDOW = 8  # chunks a process that may wait for their turn
POLL_S = 0.2

Encodings = list[Encoded | Problem]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that an encoding depends on beside the row."""

    path: Path
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    learn: Learn

    def encoding(self) -> Callable[[Record], Encoded | Problem]:
        """The function of a row."""
        encoder = Encoder(self.tokenizer)
        return lambda record: encode_row(
            record, self.path, encoder, max_length=self.max_length, learn=self.learn
        )


def n_processes(n_bytes: int) -> int:
    """How many processes encode so much of a file: one for each core, or none beside this one."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, MAX_PROCESSES) if cores > 1 and n_bytes >= WORTH_BYTES else 0


def encode_rows(
    records: Iterable[Record], job: Job, *, processes: int, stopped: Callable[[], bool]
) -> Generator[Encoded | Problem]:
    """Encode the rows, in their order, in so many processes (0: in this one); close the generator to end them.

    Raises:
        StoppedError: if `stopped` returns true; it is asked every so often.
    """
    encode = job.encoding()
    started = _start(job, processes) if processes else []
    if not started:
        for record in records:
            _check(stopped)
            yield encode(record)
        return
    with _Pool(started, encode) as pool:
        waiting: deque[Future[Encodings]] = deque()
        for chunk in _chunks(records):
            waiting.append(pool.encode(chunk))
            if len(waiting) >= WINDOW * len(started):
                yield from _result(waiting.popleft(), stopped)
        while waiting:
            yield from _result(waiting.popleft(), stopped)


def _start(job: Job, count: int) -> list["_Process"]:
    """So many processes, or as many as there can be."""
    started: list[_Process] = []
    try:
        packed = ForkingPickler.dumps(job)
    except Exception as error:  # a tokenizer whose code comes from a hub may raise anything
        logger.warning(
            "the tokenizer cannot run in other processes (%s): tokenizing in this one, which is only slower",
            error,
        )
        return started
    try:
        for _ in range(count):
            started.append(_Process(packed))  # noqa: PERF401  # those that were started before an error count
    except OSError as error:
        logger.warning(
            "only %d of %d processes for tokenizing could be started (%s): it takes longer, nothing else changes",
            len(started), count, error,
        )  # fmt: skip
    return started


def _check(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise StoppedError("stopped while the rows were tokenized: nothing was trained yet")


def _result(future: "Future[Encodings]", stopped: Callable[[], bool]) -> Encodings:
    while True:
        _check(stopped)
        with suppress(TimeoutError):
            return future.result(timeout=POLL_S)


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += len(record.text)
        if size >= CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Process:
    """One process, and this side of its pipe."""

    def __init__(self, packed: memoryview) -> None:
        self._connection, theirs = Pipe()
        self._packed: memoryview | None = packed
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def encode(self, chunk: list[Record]) -> Encodings:
        """Have it encode the rows.

        Raises:
            EOFError, OSError: if it has died.
        """
        if self._packed is not None:
            self._connection.send_bytes(self._packed)
            self._packed = None
        self._connection.send(chunk)
        encodings: Encodings = self._connection.recv()
        return encodings

    def end(self) -> None:
        """Kill it: there is nothing that it would have to put in order."""
        self._process.kill()
        self._process.wait()


class _Pool:
    """Some processes, and a thread for each that waits for it."""

    def __init__(self, processes: list[_Process], encode: Callable[[Record], Encoded | Problem]) -> None:
        self._processes = processes
        self._encode = encode
        self._ended = False
        self._here = threading.Lock()
        self._idle: SimpleQueue[_Process | None] = SimpleQueue()
        for process in processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(len(processes), "encoding")

    def encode(self, chunk: list[Record]) -> "Future[Encodings]":
        """Have the rows encoded by whichever process is idle next."""
        return self._threads.submit(self._run, chunk)

    def _run(self, chunk: list[Record]) -> Encodings:
        process = self._idle.get()
        try:
            if process:
                return process.encode(chunk)
        except (EOFError, OSError):
            process = None
            if self._ended:
                return []
            logger.warning(
                "a process for tokenizing has died (out of memory?): its rows are tokenized here, none is lost"
            )
        finally:
            self._idle.put(process)
        with self._here:  # a tokenizer is not made for several threads
            return [self._encode(record) for record in chunk]

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        for process in self._processes:
            process.end()
        self._threads.shutdown(cancel_futures=True)


def _serve(connection: Connection) -> None:
    """The other side: encode chunks until nobody sends any."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what is sent to all is meant for the one that started this
    with suppress(EOFError, OSError):
        job: Job = connection.recv()
        encode = job.encoding()
        while True:
            connection.send([encode(record) for record in connection.recv()])


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
