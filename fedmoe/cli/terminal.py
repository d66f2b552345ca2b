"""A terminal as a full screen: keys in, lines out, and everything as it was at the end, however that comes."""

import codecs
import os
import re
import select
import signal
import sys
import termios
import tty
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

from rich.cells import set_cell_size

# The alternate screen, no cursor, no line wrap; and back.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
_STYLES = {"bold": "1", "dim": "2", "reverse": "7", "red": "31", "yellow": "33"}
_COLOURS = ("red", "yellow")
_KEY = re.compile(r"\x1b(?:\[[0-9;]*[A-Za-z~]|O[A-Za-z])|.", re.DOTALL)
_KEYS = {
    "\x1b[A": "up", "\x1bOA": "up", "\x1b[B": "down", "\x1bOB": "down", "\x1b[C": "right", "\x1bOC": "right",
    "\x1b[D": "left", "\x1bOD": "left", "\x1b[5~": "page up", "\x1b[6~": "page down", "\x1b[H": "home",
    "\x1bOH": "home", "\x1b[1~": "home", "\x1b[F": "end", "\x1bOF": "end", "\x1b[4~": "end", "\x1b[Z": "shift tab",
    "\x1b": "escape", "\r": "enter", "\n": "enter", "\t": "tab", "\x7f": "backspace", "\b": "backspace",
}  # fmt: skip

Line = tuple[str, str]  # text without control characters, and its style: a name of _STYLES, or ""


class Terminal:
    """The terminal of this process, as a context manager; only the main thread may use it, but for `wake`.

    Its end restores the terminal, also after an exception; Ctrl-Z restores it until the process goes on.
    """

    def __init__(self) -> None:
        self._in, self._out = sys.stdin.fileno(), sys.stdout.fileno()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._before: dict[signal.Signals, Any] = {}
        self._has_colours = not os.environ.get("NO_COLOR")

    def __enter__(self) -> Self:
        self._modes = termios.tcgetattr(self._in)
        self._before = {
            signal.SIGWINCH: signal.signal(signal.SIGWINCH, lambda *_: self.wake()),
            signal.SIGTSTP: signal.signal(signal.SIGTSTP, self._suspend),
            signal.SIGQUIT: signal.signal(
                signal.SIGQUIT, signal.default_int_handler
            ),  # Ctrl-\ ends it like Ctrl-C
        }
        self._take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a second one must not stop half way
            signal.signal(one, signal.SIG_IGN)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        with suppress(OSError, termios.error):  # the terminal has gone
            self._give_back()

    def _take(self) -> None:
        tty.setcbreak(self._in)
        self._write(_ENTER)

    def _give_back(self) -> None:
        self._write(_LEAVE)
        termios.tcsetattr(self._in, termios.TCSAFLUSH, self._modes)

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        self._give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        # Here the process goes on.
        signal.signal(signal.SIGTSTP, self._suspend)
        self._take()
        self.wake()

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, now."""
        found = os.get_terminal_size(self._out)
        return max(found.columns, 1), max(found.lines, 1)

    def wake(self) -> None:
        """End the wait for keys; any thread may call it."""
        with suppress(BlockingIOError):  # it is awake
            os.write(self._wake, b"x")

    def wait(self, timeout_s: float) -> list[str] | None:
        """Wait for keys, a resize or `wake`; returns the keys, None if the terminal has gone.

        A key is its character or a name: up, down, left, right, page up, page down, home, end, tab, shift tab, enter,
        escape, backspace.
        """
        ready, _, _ = select.select([self._in, self._woken], [], [], timeout_s)
        if self._woken in ready:
            os.read(self._woken, 4096)
        if self._in not in ready:
            return []
        if not (typed := os.read(self._in, 4096)):
            return None
        return [_KEYS.get(one, one) for one in _KEY.findall(self._decoder.decode(typed))]

    def draw(self, lines: Sequence[Line]) -> None:
        """Show these lines from the top; what does not fit is cut off."""
        columns, rows = self.size
        shown = [self._styled(set_cell_size(text, columns), style) for text, style in lines[:rows]]
        self._write("\x1b[H" + "\x1b[K\r\n".join(shown) + "\x1b[K\x1b[J")

    def _styled(self, text: str, style: str) -> str:
        if not style or (style in _COLOURS and not self._has_colours):
            return text.rstrip()
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"

    def _write(self, text: str) -> None:
        left = text.encode(errors="backslashreplace")
        while left:
            left = left[os.write(self._out, left) :]
