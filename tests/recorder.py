"""Records which commands go to a server on which keys: by role, through a proxy each, and those inside scripts."""

import threading
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Self

import hiredis
import redis

from fedmoe.store.permissions import Right

Sent = tuple[str, str]  # a command, and one of its keys or ""

END = "the recorder ends"
CONTAINERS = ("ACL", "CLIENT", "CONFIG", "SCRIPT", "XGROUP", "XINFO")
# What redis-py sends by itself: a login, which needs no right, and its name, which may be refused.
BY_ITSELF = frozenset(("AUTH", "HELLO", "CLIENT SETINFO"))


def parts(words: Sequence[bytes], prefix: bytes = b"fedmoe:") -> list[Sent]:
    """A command as the list of rights names it, with each of its keys."""
    name = words[0].decode().upper()
    rest = list(words[1:])
    if name in CONTAINERS:
        name += f" {rest.pop(0).decode().upper()}"
    if name in ("EVAL", "EVALSHA"):
        rest = rest[2 : 2 + int(rest[1])]
    if name == "SCAN" or name.startswith("ACL "):  # a pattern and a user are no keys
        rest = []
    return [(name, key.decode()) for key in rest if key.startswith(prefix)] or [(name, "")]


class Recorder:
    """What one role sends and has executed; `tap` is for a Proxy.

    What is queued in a MULTI counts with its EXEC: rights are tried by commands that are queued and never executed.
    """

    def __init__(self) -> None:
        self.sent: set[Sent] = set()

    def tap(self) -> Callable[[bytes], None]:
        """A reader of one connection."""
        reader = hiredis.Reader()
        queued: list[Sent] | None = None

        def read(chunk: bytes) -> None:
            nonlocal queued
            reader.feed(chunk)
            while (words := reader.gets()) is not False:
                sent = [one for one in parts(words) if one[0] not in BY_ITSELF]
                if words[0] == b"MULTI":
                    queued = sent
                elif queued is not None:
                    queued += sent
                    if words[0] == b"EXEC":
                        self.sent.update(queued)
                        queued = None
                else:
                    self.sent.update(sent)

        return read


class ScriptRecorder:
    """What scripts of all clients of a server send, by MONITOR; a context manager."""

    def __init__(self, socket: Path) -> None:
        self.sent: set[Sent] = set()
        self._client = redis.Redis(unix_socket_path=str(socket), socket_timeout=None)
        self._monitor = self._client.monitor()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        self._monitor.__enter__()
        self._thread.start()
        return self

    def _listen(self) -> None:
        for said in self._monitor.listen():
            if said["client_type"] == "lua":
                self.sent.update(parts([word.encode() for word in said["command"].split(" ")]))
            elif said["command"] == f"ECHO {END}":
                return

    def __exit__(self, *error: object) -> None:
        self._client.echo(END)
        self._thread.join(10.0)
        assert not self._thread.is_alive()
        self._client.close()


def covers(right: Right, sent: Sent) -> bool:
    """True if it is this right that the command on the key needs."""
    command, key = sent
    return right.command == command and (
        any(fnmatchcase(key, glob) for glob in right.keys) if key else not right.keys
    )


def missing(sent: Iterable[Sent], rights: Sequence[Right]) -> list[Sent]:
    """What was sent and is not listed."""
    return sorted(one for one in set(sent) if not any(covers(right, one) for right in rights))


def idle(sent: Iterable[Sent], rights: Sequence[Right]) -> list[Sent]:
    """What is listed and was never sent."""
    return [
        (right.command, glob)
        for right in rights
        for glob in right.keys or ("",)
        if not any(right.command == command and fnmatchcase(key, glob) for command, key in sent)
    ]
