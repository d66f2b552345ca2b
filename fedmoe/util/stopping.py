"""Stops a long-running process within a bounded time, whatever it is doing.

SIGTERM, Ctrl-C, SIGHUP (the terminal has gone) or setting the `Stop` start it. Then:

1. At once the `Stop` is set and `when_asked` is called: loops end, the last update is published.
2. After another `patience_s`, `when_out_of_patience` is called: it cuts off the connections to Redis, so that no thread
   waits any longer for a server that does not reply.
3. After another `end_s`, the process ends with its `last_words`, even if a thread is still computing.

A second signal ends the process at once, except SIGHUP, which both the kernel and the shell send.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from types import FrameType

from fedmoe.errors import FedMoEError
from fedmoe.util.log import write_last_words

logger = logging.getLogger(__name__)

LONGEST_SAVE_S = 60.0
INTERRUPTED = 130  # the exit code after a second signal; shells also use it for Ctrl-C
_ASKED, _ENDED = 0, -1  # these differ from all signal numbers


class Stop(threading.Event):
    """An event that is set when the process is asked to stop, with the actions to take then.

    Outside `stop_on_signals` it is an ordinary event.

    Args:
        patience_s: seconds until `when_out_of_patience` is called.
        end_s: further seconds until the process is ended.
    """

    def __init__(self, *, patience_s: float = 0.5, end_s: float = 2.0) -> None:
        super().__init__()
        self.patience_s = patience_s
        self.end_s = end_s
        self.last_words: Callable[[], tuple[str, int]] = lambda: ("stopped before it had begun", 0)
        self.is_saving: Callable[[], bool] = lambda: (
            False
        )  # while True, the end waits for at most LONGEST_SAVE_S
        self.when_asked: list[Callable[[], None]] = []
        self.when_out_of_patience: list[Callable[[], None]] = []
        self.calls: SimpleQueue[int] = SimpleQueue()

    def set(self) -> None:
        """Ask the process to stop."""
        super().set()
        self.calls.put(_ASKED)


@contextmanager
def stop_on_signals(stop: Stop) -> Iterator[None]:
    """Let signals set `stop`, and ensure that the process ends soon after.

    After a signal the process ends with this block, because Python's own cleanup takes seconds on a busy machine.
    An ignored SIGHUP stays ignored (nohup).
    """
    signalled = False

    def handle(number: int, frame: FrameType | None) -> None:
        # Do no more here: the handler interrupts code that may hold the lock of an Event or of a stream.
        nonlocal signalled
        signalled = True
        stop.calls.put(number)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    watcher = threading.Thread(target=_watch, args=(stop,), name="stop", daemon=True)
    watcher.start()
    words, code = "", 0
    try:
        yield
    except FedMoEError as error:
        if not signalled:
            raise
        words, code = str(error), error.exit_code
    finally:
        stop.calls.put(_ENDED)
        watcher.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    if signalled:
        with suppress(OSError):  # the reader of stdout has gone
            sys.stdout.flush()
        _end(words, code)


def end_like_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, so that a command cleans up as it does after Ctrl-C."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # both the kernel and the shell send it
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)


def _watch(stop: Stop) -> None:
    """Wait for a signal, then for the end of the command (runs in its own thread)."""
    number = stop.calls.get()
    if number == _ENDED:
        return
    if number != _ASKED:
        logger.info("%s: stopping; send the signal again to end at once", signal.Signals(number).name)
        stop.set()
    _call(stop.when_asked)
    if _has_ended(stop, stop.patience_s):
        return
    _call(stop.when_out_of_patience)
    if _has_ended(stop, stop.end_s):
        return
    until = time.monotonic() + LONGEST_SAVE_S
    while stop.is_saving() and time.monotonic() < until:
        if _has_ended(stop, 0.1):
            return
    _end(*stop.last_words())


def _call(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        try:
            call()
        except Exception:  # the process must end even so
            logger.exception("unexpected error while stopping")


def _has_ended(stop: Stop, seconds: float) -> bool:
    """Wait up to `seconds` for the command to end; another signal ends the process."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        with suppress(Empty):
            number = stop.calls.get(timeout=left)
            if number == _ENDED:
                return True
            if number not in (_ASKED, signal.SIGHUP):
                _end("interrupted", INTERRUPTED)
    return False


def _end(words: str, code: int) -> None:
    """Kill child processes, print `words` if there are any, and end this process at once."""
    for child in multiprocessing.active_children():
        child.kill()
    with suppress(OSError):
        write_last_words(words, is_error=bool(code))
    os._exit(code)


@contextmanager
def without_interrupt() -> Iterator[None]:
    """Ctrl-C waits for the end of the block; else Python raises KeyboardInterrupt anywhere in the main thread."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *what: came.append(what))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])
