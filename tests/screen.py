"""A terminal for tests: a program runs in it, is typed to, and its screen is read as a person would see it."""

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.processes import environment, eventually

_PIECE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|(\r)|(\n)|([^\x00-\x1f\x7f-\x9f])|(.)", re.DOTALL)

_BEGUN = re.compile(r"\x1b(\[[?0-9;]*)?$")


class Screen:
    """What is on the screen; any control sequence that `fedmoe top` does not send itself is an error.

    Attributes:
        is_alternate, has_cursor, wraps: the modes of the terminal; strange: what nobody may send.
    """

    def __init__(self) -> None:
        self.is_alternate, self.has_cursor, self.wraps = False, True, True
        self.strange: list[str] = []
        self.normal: list[str] = [""]
        self._alternate: list[str] = [""]
        self._row = self._column = 0

    @property
    def lines(self) -> list[str]:
        return self._alternate if self.is_alternate else self.normal

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def feed(self, text: str) -> None:
        for piece in _PIECE.finditer(text):
            arguments, command, back, down, letter, _ = piece.groups()
            if command:
                self._obey(arguments + command)
            elif back:
                self._column = 0
            elif down:
                self._row += 1
            elif letter:
                self._put(letter)
            else:
                self.strange.append(piece[0])

    def _obey(self, sequence: str) -> None:
        match sequence:
            case "?1049h":
                self.is_alternate, self._alternate, self._row, self._column = True, [""], 0, 0
            case "?1049l":
                self.is_alternate, self._row, self._column = False, len(self.normal) - 1, 0
            case "?25l" | "?25h":
                self.has_cursor = sequence.endswith("h")
            case "?7l" | "?7h":
                self.wraps = sequence.endswith("h")
            case "H":
                self._row = self._column = 0
            case "K":
                self._fill()
                self.lines[self._row] = self.lines[self._row][: self._column]
            case "J":
                del self.lines[self._row + 1 :]
            case _ if not re.fullmatch(r"[0-9;]*m", sequence):
                self.strange.append(sequence)

    def _fill(self) -> None:
        self.lines.extend([""] * (self._row + 1 - len(self.lines)))

    def _put(self, letter: str) -> None:
        self._fill()
        line = self.lines[self._row].ljust(self._column)
        self.lines[self._row] = line[: self._column] + letter + line[self._column + 1 :]
        self._column += 1


class Typed:
    """A program in a terminal of its own."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int, before: list[Any]) -> None:
        self.process = process
        self.screen = Screen()
        self._terminal, self._before = terminal, before
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
        while True:
            ready, _, _ = select.select([self._terminal], [], [], 0.05)
            if not ready:
                if self.process.poll() is not None and not select.select([self._terminal], [], [], 0)[0]:
                    return
                continue
            came = os.read(self._terminal, 65536)
            text = rest + decoder.decode(came)
            begun = _BEGUN.search(text)  # a sequence that is not whole yet
            rest = begun[0] if begun else ""
            with self._lock:
                self.screen.feed(text.removesuffix(rest) if rest else text)

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def shows(self, *texts: str) -> str:
        """Wait until the screen shows these; returns all of it."""

        def look() -> str:
            with self._lock:
                text = self.screen.text
            assert all(one in text for one in texts), text
            return text

        return str(eventually(f"{texts} on the screen", look))

    def hides(self, text: str) -> str:
        """Wait until the screen does not show this any more."""

        def look() -> str:
            with self._lock:
                shown = self.screen.text
            assert text not in shown
            return shown

        return str(eventually(f"no {text} on the screen", look))

    def end(self) -> int:
        """Wait for the end of the program; the terminal must be as it was before."""
        code = self.process.wait(60)
        self._reader.join(10)
        self.is_clean()
        return code

    def is_clean(self) -> None:
        screen = self.screen
        assert (screen.is_alternate, screen.has_cursor, screen.wraps) == (False, True, True)
        assert screen.strange == []
        assert termios.tcgetattr(self._terminal) == self._before


@contextmanager
def typing(command: Sequence[str], *, columns: int = 120, lines: int = 20, **extra: str) -> Iterator[Typed]:
    """Run a command in a terminal of this size; killed at the end."""
    terminal, inside = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    before = termios.tcgetattr(terminal)
    process = subprocess.Popen(
        command, stdin=inside, stdout=inside, stderr=inside, env=environment(**{"TERM": "xterm"} | extra),
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  # the test has one thread
    )  # fmt: skip
    typed = Typed(process, terminal, before)
    try:
        yield typed
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(inside)
        typed._reader.join(10)
        os.close(terminal)
