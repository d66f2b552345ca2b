"""A TCP proxy that breaks connections on purpose, between real clients and a real server.

    with Proxy(redis.socket) as proxy:
        worker = connect(proxy.url)
        fired = proxy.on(b"EXEC", "cut_after")  # the server executes it, the client never hears of it
        ...
        assert fired.wait(5)

One thread runs an event loop that carries all bytes, so a fault needs no lock: it is a word to that loop, or an
attribute that the loop looks at. `hits` counts what really happened: a test whose fault never came must fail.
"""

import asyncio
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

CHUNK = 256 * 1024  # bytes read at once
LATE_S = 0.3  # "late" holds the bytes back for so long
ANSWER_S = 0.2  # "cut_after" waits at most so long for the answer to begin
LINGER_S = 0.3  # then the server has so long to finish, without its client

Direction = Literal["up", "down"]  # to the server, to the client
Action = Literal["cut_before", "cut_in_middle", "cut_after", "late"]


@dataclass
class _Fault:
    action: str
    skip: int  # needles, or without a needle bytes
    needle: bytes = b""
    fired: threading.Event = field(default_factory=threading.Event)


@dataclass
class _Link:
    client: socket.socket
    server: socket.socket
    active: float  # when bytes last came, by the loop's clock
    tap: Callable[[bytes], None] | None = None  # is given all that goes up
    fault: _Fault | None = None  # what struck it
    chunk: bytes = b""  # and where


class Proxy:
    """Listens on a free port of 127.0.0.1; a context manager. All its methods may be called from any thread.

    Args:
        upstream: path of a unix socket, or (host, port); while nobody listens there, clients are closed at once.

    Attributes:
        delay_s: sleep before every chunk that goes to a client.
        refuse: close new connections at once.
        idle_timeout_s: forget a connection on which nothing came for so long, as a NAT does; its client is reset when
            it next sends something; 0 for never.
        tap: makes, for each new connection, what is given all bytes that go up; None for nobody.
        hits: how many connections ended how ("closed", "unreachable", "refused", "idle", "cut", "cut_after_bytes", and
            the actions of `on`), how many chunks were "delayed" and "frozen", and how many "arrived" late.
    """

    def __init__(self, upstream: str | Path | tuple[str, int]) -> None:
        self.upstream = upstream if isinstance(upstream, tuple) else str(upstream)
        self.delay_s = 0.0
        self.refuse = False
        self.tap: Callable[[], Callable[[bytes], None]] | None = None
        self.idle_timeout_s = 0.0
        self.hits: Counter[str] = Counter()
        self._faults: list[_Fault] = []
        self._budgets: dict[Direction, _Fault] = {}
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._loop = asyncio.new_event_loop()
        self._listening = self._loop.create_task(self._listen())
        self._open: set[asyncio.Task[None]] = set()  # one for each connection that has its client
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._listening.cancel)
        self._thread.join(10.0)

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._open)

    def cut(self) -> None:
        """Reset all connections now."""
        asyncio.run_coroutine_threadsafe(_end(self._open), self._loop).result(10.0)

    def cut_after(self, n_bytes: int, direction: Direction) -> threading.Event:
        """Once: after n more bytes, of all connections together, reset the one with the next; an event, as of `on`."""
        self._budgets[direction] = fault = _Fault("cut_after_bytes", n_bytes)
        return fault.fired

    def on(self, argument: bytes, action: Action, skip: int = 0) -> threading.Event:
        r"""Once, after `skip` others: break the connection on which a command with this argument goes up.

        The argument may be the command's name. What breaks is the chunk of bytes in which b"\r\nARGUMENT\r\n" ends:

            cut_before     the server never gets it
            cut_in_middle  the server gets half of it
            cut_after      the server gets it and answers; the client never sees the answer
            late           the client is reset now; the server gets it 0.3 s later, and executes it

        Returns an event that is set when it strikes.
        """
        fault = _Fault(action, skip, b"\r\n" + argument.strip() + b"\r\n")
        self._faults.append(fault)
        return fault.fired

    def freeze(self) -> None:
        """Hold all bytes, also those of new connections, until `thaw`."""
        self._loop.call_soon_threadsafe(self._thawed.clear)

    def thaw(self) -> None:
        """Let all bytes go, also those of clients that gave up meanwhile."""
        self._loop.call_soon_threadsafe(self._thawed.set)

    # All that follows runs in the loop's thread.

    def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._listening)
        self._loop.close()

    async def _listen(self) -> None:
        with self._listener:
            try:
                while True:
                    client, _ = await self._loop.sock_accept(self._listener)
                    self._open.add(task := self._loop.create_task(self._serve(client)))
                    task.add_done_callback(self._open.discard)
            finally:
                await _end(asyncio.all_tasks() - {self._listening})

    async def _serve(self, client: socket.socket) -> None:
        """One connection: carry its bytes until something ends it, then end it in that way."""
        family = socket.AF_INET if isinstance(self.upstream, tuple) else socket.AF_UNIX
        with client, socket.socket(family) as server, suppress(OSError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link, ending = _Link(client, server, self._loop.time(), self.tap() if self.tap else None), "cut"
            try:
                ending = "refused" if self.refuse else await self._carry(link)
            finally:
                self._open.discard(asyncio.current_task())
                self.hits[ending] += 1
                if ending in ("cut", "cut_before", "cut_in_middle", "cut_after_bytes"):
                    _reset(client)
                    _reset(server)
                if link.fault is not None:
                    link.fault.fired.set()
            if ending in ("cut_after", "late"):
                await self._finish(link, ending)
            elif ending == "idle":
                server.close()
                await self._loop.sock_recv(client, 1)
                _reset(client)

    async def _carry(self, link: _Link) -> str:
        """Carry bytes both ways until one of the ways ends; returns why."""
        link.client.setblocking(False)
        link.server.setblocking(False)
        try:
            await self._loop.sock_connect(link.server, self.upstream)
        except OSError:
            return "unreachable"
        ways = (self._pump(link, "up"), self._pump(link, "down"), self._watch_idle(link))
        tasks = [self._loop.create_task(way) for way in ways]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(task for task in tasks if task.done()).result()
        except OSError:
            return "closed"
        finally:
            await _end(tasks)

    async def _pump(self, link: _Link, direction: Direction) -> str:
        ends = (link.client, link.server)
        source, target = ends if direction == "up" else ends[::-1]
        buffer, tail = bytearray(CHUNK), b""
        while n := await self._loop.sock_recv_into(source, buffer):
            link.active = self._loop.time()
            chunk = memoryview(buffer)[:n]
            if direction == "down" and self.delay_s:
                self.hits["delayed"] += 1
                await asyncio.sleep(self.delay_s)
            if not self._thawed.is_set():
                self.hits["frozen"] += 1
                await self._thawed.wait()
            if direction == "up" and link.tap:
                link.tap(bytes(chunk))
            fault, allowed = self._judge(direction, tail, chunk)
            await self._loop.sock_sendall(target, chunk[:allowed])
            if fault is not None:
                link.fault, link.chunk = fault, bytes(chunk)
                return fault.action
            tail = (tail + chunk[-256:])[-256:]  # a needle may span chunks
        return "closed"

    def _judge(self, direction: Direction, tail: bytes, chunk: memoryview) -> tuple[_Fault | None, int]:
        """The fault that strikes at this chunk, and how many bytes of it go through before."""
        if budget := self._budgets.get(direction):
            if budget.skip < len(chunk):
                return self._budgets.pop(direction), budget.skip
            budget.skip -= len(chunk)
        for fault in self._faults if direction == "up" else ():
            found = (tail[1 - len(fault.needle) :] + chunk).count(fault.needle)
            if found > fault.skip:
                self._faults.remove(fault)
                return fault, len(chunk) // 2 if fault.action == "cut_in_middle" else 0
            fault.skip -= found
        return None, len(chunk)

    async def _watch_idle(self, link: _Link) -> str:
        while not self.idle_timeout_s or self._loop.time() < link.active + self.idle_timeout_s:
            await asyncio.sleep(0.05)
        return "idle"

    async def _finish(self, link: _Link, action: str) -> None:
        """Let the server have its client's last bytes and execute them, while the client is cut."""
        if action == "late":
            _reset(link.client)
            await asyncio.sleep(LATE_S)
        await self._loop.sock_sendall(link.server, link.chunk)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._loop.sock_recv(link.server, 1), ANSWER_S)
        if action == "late":
            self.hits["arrived"] += 1
        _reset(link.client)
        await asyncio.sleep(LINGER_S)


async def _end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _reset(end: socket.socket) -> None:
    """Close with RST instead of FIN (to a unix socket it is all the same)."""
    if end.fileno() >= 0:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.close()
