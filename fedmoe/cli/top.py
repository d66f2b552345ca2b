"""`fedmoe top`: the federation on a full screen, for people on ssh."""

import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

import click

from fedmoe.cli.declared import redis_options
from fedmoe.cli.options import Duration
from fedmoe.settings import RedisSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedmoe.protocol.federation import Federation
    from fedmoe.store.inspect import Inspector


@click.command()
@redis_options
@click.option("--interval", type=Duration(), default="2s", show_default=True, metavar="TIME",
              help="Time between two looks at Redis, like 2s.")  # fmt: skip
def top(redis: RedisSettings, interval: float) -> None:
    """Show experts, workers, refusals and findings on a full screen that scrolls, sorts and filters; q ends it.

    It only reads, so any monitoring user may run it. Without a terminal use `fedmoe status`.
    """
    from fedmoe.errors import SettingsError
    from fedmoe.store.connection import Connection
    from fedmoe.store.inspect import Inspector
    from fedmoe.util.stopping import end_like_ctrl_c

    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM", "dumb") in (
        "dumb",
        "unknown",
    ):
        raise SettingsError(
            "`fedmoe top` needs a terminal that can move its cursor: use `fedmoe status`, or `fedmoe status --watch`",
            about="terminal",
        )
    end_like_ctrl_c()
    try:
        run(Inspector(Connection(redis)), interval)
    except KeyboardInterrupt:  # the user ends it this way, too
        return


class Reader:
    """Reads the federation again and again in a thread of its own, so that keys work while Redis does not answer.

    Args:
        changed: called after each attempt.

    Attributes:
        seen: the last state and when it was read (seconds, monotonic); None before the first.
        problem: why the last attempt failed, "" if it did not.
    """

    def __init__(self, inspector: "Inspector", interval_s: float, changed: "Callable[[], None]") -> None:
        self.seen: tuple[Federation, float] | None = None
        self.problem = ""
        self._inspector = inspector
        self._interval_s = interval_s
        self._changed = changed
        threading.Thread(target=self._run, name="reader", daemon=True).start()

    def _run(self) -> None:
        from fedmoe.errors import FedMoEError

        while True:
            try:
                self.seen, self.problem = (self._inspector.federation(), time.monotonic()), ""
            except FedMoEError as error:
                self.problem = str(error)
            except Exception as error:  # a traceback would be written over the screen
                self.problem = f"unexpected error: {error!r}"
            self._changed()
            time.sleep(self._interval_s)


def run(inspector: "Inspector", interval_s: float) -> None:
    """Show the federation until the user quits, or the terminal has gone."""
    from fedmoe.cli.terminal import Terminal
    from fedmoe.cli.top_view import View
    from fedmoe.protocol.federation import duration
    from fedmoe.util.text import printable

    view = View()
    logging.disable()  # a message would be written over the screen
    with Terminal() as terminal:
        reader = Reader(inspector, interval_s, terminal.wake)
        while True:
            seen, problem = reader.seen, printable(reader.problem, None)
            if problem and seen:
                problem = f"the state of {duration(time.monotonic() - seen[1])} ago, because {problem}"
            width, height = terminal.size
            now = time.strftime("%H:%M:%SZ", time.gmtime())
            terminal.draw(
                view.lines(seen[0] if seen else None, problem=problem, now=now, width=width, height=height)
            )
            keys = terminal.wait(timeout_s=1.0)
            if keys is None or not all(map(view.press, keys)):
                return
