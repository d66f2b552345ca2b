"""Stopping a long-running process within a bounded time, whatever it is doing when it is asked.

SIGTERM, Ctrl-C and SIGHUP (the terminal has gone) ask for it, and so does whoever sets the `Stop`. Then:

1. At once the `Stop` is set, and `when_asked` is called: loops end, the last update is published.
2. After `patience_s` more, `when_out_of_patience` is called: it cuts off the connections to Redis, so that nothing
   waits any longer for a server that does not answer.
3. After `end_s` more, the process ends with its `last_words`, even if some thread of it still calculates.

A second signal ends the process at once, except SIGHUP: the kernel sends it, and the shell once more.
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

logger = logging.getLogger(__name__)

LONGEST_SAVE_S = 60.0
INTERRUPTED = 130  # the exit code after a second signal, which shells also give for Ctrl-C
_ASKED, _ENDED = 0, -1  # beside the numbers of signals


class Stop(threading.Event):
    """An event that is set when the process is asked to stop, and what shall happen then.

    Without `stop_on_signals` around it, it is an event like any other.

    Args:
        patience_s: after so many seconds `when_out_of_patience` is called.
        end_s: after so many more the process is ended.
    """

    def __init__(self, *, patience_s: float = 0.5, end_s: float = 2.0) -> None:
        super().__init__()
        self.patience_s = patience_s
        self.end_s = end_s
        self.last_words: Callable[[], tuple[str, int]] = lambda: ("stopped before it had begun", 0)
        self.is_saving: Callable[[], bool] = lambda: False  # then the end waits, at most for LONGEST_SAVE_S
        self.when_asked: list[Callable[[], None]] = []
        self.when_out_of_patience: list[Callable[[], None]] = []
        self.calls: SimpleQueue[int] = SimpleQueue()

    def set(self) -> None:
        """Ask the process to stop."""
        super().set()
        self.calls.put(_ASKED)


@contextmanager
def stop_on_signals(stop: Stop) -> Iterator[None]:
    """Have signals set `stop`, and see to it that the process has ended soon after.

    After a signal the process ends with this block: what Python tidies up at its end takes seconds on a busy machine.
    SIGHUP stays ignored where it is (nohup).
    """
    signalled = False

    def handle(number: int, frame: FrameType | None) -> None:
        # No more than this: a handler interrupts code that may hold the lock of an Event or of a stream.
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
        with suppress(OSError):  # nobody reads it any more
            sys.stdout.flush()
        _end(words, code)


def end_like_ctrl_c() -> None:
    """Have SIGTERM and SIGHUP raise KeyboardInterrupt, so that a command tidies up as it does after Ctrl-C."""

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the kernel sends it, and the shell once more
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)


def _watch(stop: Stop) -> None:
    """The thread that waits for signals, and then for the end."""
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
        except Exception:  # the process has to end all the same
            logger.exception("unexpected error while stopping")


def _has_ended(stop: Stop, seconds: float) -> bool:
    """Wait so long for the command to end by itself; a signal meanwhile ends the process."""
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
    """End the process here and now, with these words if there are any, and its children that share its work."""
    for child in multiprocessing.active_children():
        child.kill()
    text = f"fedmoe: {words}\n" if code else f"{words}\n" if words else ""
    with suppress(OSError):
        # Not by sys.stdout: the thread that is stuck may hold its lock.
        os.write(2 if code else 1, text.encode(errors="backslashreplace"))
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
