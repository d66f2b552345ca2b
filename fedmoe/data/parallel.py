"""Encodes rows in several processes, with the same result and order as in one process, but faster.

Each process is a new Python, not a fork, because threads and a GPU may be in use here. It receives the tokenizer, then
one chunk of rows after another, through a pipe that no other process has. It ends when the pipe is closed, so it never
outlives this process.
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

WORTH_BYTES = 8 * 2**20  # smallest file for more processes, which take seconds to start
MAX_PROCESSES = 16  # each holds a tokenizer of some 100 MiB
CHUNK_CHARS = 50_000  # some 0.1 s of work
WINDOW = 8  # maximum number of chunks in progress per process
POLL_S = 0.2

Encodings = list[Encoded | Problem]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything on which an encoding depends, except the row."""

    path: Path
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    learn: Learn

    def encoding(self) -> Callable[[Record], Encoded | Problem]:
        """The function that encodes a row."""
        encoder = Encoder(self.tokenizer)
        return lambda record: encode_row(
            record, self.path, encoder, max_length=self.max_length, learn=self.learn
        )


def n_processes(n_bytes: int) -> int:
    """Number of extra processes that encode `n_bytes` of a file: one per core, or 0 for a small file."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, MAX_PROCESSES) if cores > 1 and n_bytes >= WORTH_BYTES else 0


def encode_rows(
    records: Iterable[Record], job: Job, *, processes: int, stopped: Callable[[], bool]
) -> Generator[Encoded | Problem]:
    """Encode the rows in order, in extra processes (0: in this one); closing the generator ends them.

    Raises:
        StoppedError: if `stopped`, which is called repeatedly, returns True.
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
    """Start `count` processes, or as many as the system allows."""
    started: list[_Process] = []
    try:
        packed = ForkingPickler.dumps(job)
    except Exception as error:  # a tokenizer whose code comes from a hub may raise anything
        logger.warning(
            "the tokenizer cannot run in other processes (%s): rows are tokenized in this one, which is slower",
            error,
        )
        return started
    try:
        for _ in range(count):
            started.append(_Process(packed))  # noqa: PERF401  # those that were started before an error count
    except OSError as error:
        logger.warning(
            "only %d of %d processes for tokenizing could be started (%s): tokenizing only takes longer",
            len(started), count, error,
        )  # fmt: skip
    return started


def _check(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise StoppedError("stopped while the rows were tokenized: nothing was trained yet", about="tokens")


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
        """Send the rows to the process and return their encodings.

        Raises:
            EOFError, OSError: if the process has died.
        """
        if self._packed is not None:
            self._connection.send_bytes(self._packed)
            self._packed = None
        self._connection.send(chunk)
        encodings: Encodings = self._connection.recv()
        return encodings

    def end(self) -> None:
        """Kill the process; it has nothing to clean up."""
        self._process.kill()
        self._process.wait()


class _Pool:
    """Processes, and for each of them a thread that waits for its result."""

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
        """Encode the rows in the next idle process."""
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
                "a process for tokenizing has died (out of memory?): its rows are tokenized here, no row is lost"
            )
        finally:
            self._idle.put(process)
        with self._here:  # a tokenizer is not thread-safe
            return [self._encode(record) for record in chunk]

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        for process in self._processes:
            process.end()
        self._threads.shutdown(cancel_futures=True)


def _serve(connection: Connection) -> None:
    """Run in the started process: encode chunks until the pipe is closed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a signal to the group is for the parent process
    with suppress(EOFError, OSError):
        job: Job = connection.recv()
        encode = job.encoding()
        while True:
            connection.send([encode(record) for record in connection.recv()])


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
