"""Points between any two steps of a process, at which it can be made to die, to stop, or to lose its connection.

The product knows nothing of them. For each request to Redis there are four: `before` it is sent, with `half` of its
bytes sent, when it is `sent`, and at each reply when it is `answered`; and around each step of writing a file. A point
is named by the method that does it: `WorkerStore.publish half`, `ExpertStore.commit sent`, `StateDir.save before`.
"""

import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import redis
from redis.connection import AbstractConnection

from fedmoe.store.redis_private import socket_of

Action = Literal["kill", "stop", "cut"]
WHERE = ("/fedmoe/store/", "/fedmoe/store/archive.py", "/producers/checkpoint.py")
# Method -> about how many points one call passes; a process dies within its first few calls.
WORKER = {
    "WorkerStore.publish": 20, "WorkerStore.pull": 12, "WorkerStore.poll": 8, "StateDir.save": 16,
    "Presence.beat": 8, "WorkerStore.spec": 4, "Presence.heartbeat": 4,
}  # fmt: skip
AGGREGATOR = {
    "ExpertStore.commit": 30, "ExpertStore.load": 12, "ExpertStore.read": 8, "ExpertStore.reclaim": 4,
    "Submissions.headers": 4, "Submissions.parts": 4, "Lease.keep": 4, "Archive.keep": 6,
    "ExpertLifecycle.condition": 6, "ExpertLifecycle.claim": 6, "ExpertLifecycle.write_back": 12,
    "ExpertLifecycle.announce": 12, "Lease.release": 4, "Aggregators.beat": 4,
    "GatewayStore.write_merged": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """Act at the `passage`-th point of `method` that this process passes; then never again."""

    method: str
    passage: int
    action: Action

    @classmethod
    def draw(cls, methods: dict[str, int], dice: random.Random) -> "Arm":
        method = dice.choice(list(methods))
        passage = dice.randint(1, methods[method] * dice.choice((1, 1, 2, 8)))
        return cls(method, passage, dice.choices(("kill", "cut", "stop"), (8, 1, 1))[0])


class Failpoints:
    """The points of this process; `install` puts them in place.

    Args:
        arm: what is to happen, None for nothing.
        journal: a line goes there before it happens.
        name: of this process.
    """

    def __init__(self, arm: Arm | None, journal: Path, name: str) -> None:
        self._arm = arm
        self._journal = journal
        self._name = name
        self._passed = 0

    def install(self) -> None:
        """Wrap redis-py's connections and what writes files."""
        if self._arm is None:
            return
        send, receive = AbstractConnection.send_packed_command, AbstractConnection.read_response

        def send_packed_command(connection: Any, command: Any, check_health: bool = True) -> None:
            method = self._method()
            used = socket_of(connection)
            if method is None or used is None:
                send(connection, command, check_health)
                return
            self._pass(method, "before", connection)
            chunks = [command] if isinstance(command, bytes | str) else list(command)
            if self._comes_next(method):
                data = b"".join(bytes(c) if not isinstance(c, str) else c.encode() for c in chunks)
                used.sendall(data[: len(data) // 2])
                self._pass(method, "half", connection)
                used.sendall(data[len(data) // 2 :])
            else:
                self._pass(method, "half", connection)
                send(connection, chunks, check_health)
            self._pass(method, "sent", connection)

        def read_response(connection: Any, *args: Any, **kwargs: Any) -> Any:
            reply = receive(connection, *args, **kwargs)
            if method := self._method():
                self._pass(method, "answered", connection)
            return reply

        # Into the libraries, from outside, so that the product has no failpoints in it.
        AbstractConnection.send_packed_command = send_packed_command
        AbstractConnection.read_response = read_response
        os.fsync = self._around(os.fsync)
        Path.replace = self._around(Path.replace)

    def _around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def around(*args: Any) -> Any:
            method = self._method()
            if method is None:
                return step(*args)
            self._pass(method, "before", None)
            result = step(*args)
            self._pass(method, "after", None)
            return result

        return around

    @staticmethod
    def _method() -> str | None:
        """The outermost method of the stores that is running."""
        frame, found = sys._getframe(2), None
        while frame is not None:
            if any(place in frame.f_code.co_filename for place in WHERE) and "." in frame.f_code.co_qualname:
                found = frame.f_code.co_qualname
            frame = frame.f_back
        return None if found is None or "<" in found else found

    def _comes_next(self, method: str) -> bool:
        arm = self._arm
        return arm is not None and arm.method == method and self._passed + 1 == arm.passage

    def _pass(self, method: str, moment: str, connection: Any) -> None:
        arm = self._arm
        if arm is None or arm.method != method:
            return
        self._passed += 1
        if self._passed != arm.passage:
            return
        self._arm = None
        action = "kill" if arm.action == "cut" and connection is None else arm.action
        line = f"{self._name} {os.getpid()} {action} {method} {moment}\n"
        with self._journal.open("a") as out:
            out.write(line)
        if action == "cut":
            connection.disconnect()
            raise redis.ConnectionError("cut at a failpoint")
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)


if __name__ == "__main__":
    # METHOD PASSAGE ACTION JOURNAL and then a command of fedmoe: run it with that one failpoint.
    import fedmoe.cli.main

    _method, _passage, _action, _journal = sys.argv[1:5]
    Failpoints(Arm(_method, int(_passage), _action), Path(_journal), _method).install()
    sys.argv = ["fedmoe", *sys.argv[5:]]
    fedmoe.cli.main.main()
