"""The one reader of Redis: looks, makes a picture, and tells everybody who waits for one."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fedmoe.errors import FedMoEError
from fedmoe.protocol.federation import ServerView
from fedmoe.settings import RedisSettings
from fedmoe.store.chronicles import Chronicles
from fedmoe.store.connection import Connection
from fedmoe.store.inspect import Inspector
from fedmoe.tools.dashboard.events import Event, Events, differences
from fedmoe.tools.dashboard.picture import Painter, Picture, redis_of
from fedmoe.util.backoff import Backoff

IDLE_S = 5.0  # between two looks while nobody looks
INTERNAL = "internal error: see the dashboard's log"
REST = 3.0  # after a look that took t seconds, it rests for at least REST × t; waiting in vain does not count

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the last look found.

    Args:
        number: of the look; one that failed counts, too.
        at: when Redis last answered (seconds since 1970, by this machine's clock), 0 for never.
        picture: as Redis last answered.
        problem: why Redis did not answer this time, "" if it did.
        last_event: number of the newest event.
    """

    number: int = 0
    at: float = 0.0
    picture: Picture = field(default_factory=Picture)
    problem: str = ""
    last_event: int = 0


class Watcher:
    """Looks at Redis every `interval_s` seconds, or every IDLE_S seconds while nobody looks.

    Args:
        redis: how to reach it.
        interval_s: seconds between two looks.
        on_look: called after each look, in the watcher's thread.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        redis: RedisSettings,
        *,
        interval_s: float,
        on_look: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.connection = Connection(redis)
        self.on_look = on_look
        self.events = Events()
        self.wanted = threading.Event()  # somebody began to look
        self.is_watched: Callable[[], bool] = lambda: False
        self._interval_s, self._clock = interval_s, clock
        self._inspector, self._chronicles = Inspector(self.connection), Chronicles(self.connection)
        self._painter = Painter()
        empty = Picture(federation={"redis": redis_of(ServerView(url=redis.shown))})
        self._look = Look(picture=empty)

    @property
    def last(self) -> Look:
        """The last look; it is replaced, never changed."""
        return self._look

    def look(self) -> None:
        """Look at Redis once.

        Raises:
            RedisUnavailableError: if Redis does not answer; the last picture stays.
        """
        now = self._clock()
        try:
            seen = self._inspector.federation()
            lineages = {one.name: one.meta.lineage if one.meta else "" for one in seen.experts}
            chronicles = self._chronicles.read(lineages)
        except FedMoEError as error:
            if not self._look.problem:
                self.events.add([Event(at=now, kind="redis", is_bad=True, text=str(error))])
            self._put(self._look.at, self._look.picture, str(error))
            raise
        now = seen.read_at
        picture = self._painter.paint(seen, chronicles, now)
        if self._look.problem:
            self.events.add([Event(at=now, kind="redis", text="Redis answers again")])
        self.events.tell(chronicles)
        if self._look.at:
            self.events.add(differences(self._look.picture, picture, now))
        self._put(self._clock(), picture, "")

    def _put(self, at: float, picture: Picture, problem: str) -> None:
        self._look = Look(
            number=self._look.number + 1, at=at, picture=picture, problem=problem, last_event=self.events.last
        )
        self.on_look()

    def run(self, stop: threading.Event) -> None:
        """Look again and again until told to stop; an error is logged, and what was seen before stays."""
        backoff, unexpected = Backoff("dashboard", logger), ""
        while not stop.is_set():
            began, took = time.monotonic(), 0.0
            try:
                self.look()
                took = time.monotonic() - began
                backoff.ok()
            except FedMoEError as error:
                backoff.failed(error)
            except Exception as error:
                if repr(error) != unexpected:  # else each look would log it
                    unexpected = repr(error)
                    logger.exception("unexpected error while reading Redis")
                self._put(self._look.at, self._look.picture, INTERNAL)
                took = time.monotonic() - began
            self._rest(stop, max(self._interval_s, REST * took))

    def _rest(self, stop: threading.Event, rest_s: float) -> None:
        if stop.wait(rest_s):
            return
        until = time.monotonic() + IDLE_S - rest_s
        while not stop.is_set() and not self.is_watched() and time.monotonic() < until:
            if self.wanted.wait(0.2):
                break
        self.wanted.clear()
