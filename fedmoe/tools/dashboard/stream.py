"""Server-sent events: every client hears of the newest look and of each event; one that is too slow is dropped."""

import asyncio
import json
import logging
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fedmoe.tools.dashboard.guard import Receive, Scope, Send
from fedmoe.tools.dashboard.watcher import Look, Watcher

MOST_CLIENTS = 200
SEND_S = 10.0  # a client that does not take one message in this time is dropped
KEEP_ALIVE_S = 15.0
MOST_EVENTS = 50  # that are sent at once, the newest

logger = logging.getLogger(__name__)


class Hub:
    """The clients that listen; `wake` may be called from any thread.

    Args:
        watcher: the reader of Redis.
        send_s: seconds that a client has to take a message.
    """

    def __init__(self, watcher: Watcher, *, send_s: float = SEND_S) -> None:
        self.watcher, self.send_s = watcher, send_s
        self.dropped = 0
        self._clients: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}
        self.is_closing = False

    def __len__(self) -> int:
        """The number of clients."""
        return len(self._clients)

    def wake(self) -> None:
        """Tell every client that there is something new."""
        for event, loop in list(self._clients.items()):
            with suppress(RuntimeError):  # its loop has ended
                loop.call_soon_threadsafe(event.set)

    def close(self) -> None:
        """End all streams."""
        self.is_closing = True
        self.wake()

    def add(self) -> asyncio.Event:
        """A new client's event, set once there is something new."""
        event = asyncio.Event()
        event.set()
        self._clients[event] = asyncio.get_running_loop()
        self.watcher.wanted.set()
        return event

    def remove(self, event: asyncio.Event) -> None:
        """Forget a client."""
        self._clients.pop(event, None)


class EventStream(Response):
    """One client's stream.

    Args:
        hub: that it listens to.
        after: number of the last event that the client knows.
    """

    media_type = "text/event-stream"

    def __init__(self, hub: Hub, after: int) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.headers["X-Accel-Buffering"] = "no"  # nginx would hold messages back
        self._hub, self._after = hub, after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the client leaves, is too slow, or the dashboard stops."""
        woken = self._hub.add()
        gone = asyncio.ensure_future(_until_gone(receive))
        head = scope["method"] == "HEAD"
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            if not head:
                await self._talk(woken, gone, send)
            with suppress(TimeoutError):
                await asyncio.wait_for(
                    send({"type": "http.response.body", "body": b"", "more_body": False}), 1.0
                )
        except TimeoutError:
            self._hub.dropped += 1
            logger.info("a client that took no message for %.0f s was dropped", self._hub.send_s)
        finally:
            gone.cancel()
            self._hub.remove(woken)

    async def _talk(self, woken: asyncio.Event, gone: "asyncio.Future[Any]", send: Send) -> None:
        known = -1
        while not gone.done() and not self._hub.is_closing:
            waiting: asyncio.Future[Any] = asyncio.ensure_future(woken.wait())
            await asyncio.wait({waiting, gone}, timeout=KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            woken.clear()
            look = self._hub.watcher.last
            text = ": still here\n\n" if look.number == known else self._news(look)
            known = look.number
            body = {"type": "http.response.body", "body": text.encode(), "more_body": True}
            await asyncio.wait_for(send(body), self._hub.send_s)

    def _news(self, look: Look) -> str:
        text = ""
        if look.last_event > self._after:
            for event in reversed(self._hub.watcher.events.newest(MOST_EVENTS, after=self._after)):
                text += message("event", event, number=event["number"])
                self._after = max(self._after, event["number"])
        return text + message("look", {"number": look.number, "at": look.at, "problem": look.problem})


def message(kind: str, content: dict[str, Any], *, number: int | None = None) -> str:
    """One server-sent event."""
    named = "" if number is None else f"id: {number}\n"
    return f"{named}event: {kind}\ndata: {json.dumps(content)}\n\n"


async def _until_gone(receive: Callable[[], Any]) -> None:
    while True:
        said: MutableMapping[str, Any] = await receive()
        if said["type"] == "http.disconnect":
            return


def last_event_of(request: Request, newest: int) -> int:
    """The number of the last event that a client knows: as it says, else the newest one.

    After a restart of the dashboard the numbers begin again, so one that does not exist yet counts as 0.
    """
    said = request.headers.get("last-event-id", "")
    if not said:
        return newest
    known = int(said) if said.isascii() and said.isdecimal() and len(said) < 16 else 0
    return known if known <= newest else 0
