"""Real redis-py clients, stepped one request at a time: pause before a request, or lose the reply to one.

A request is what goes over the wire at once: one command, or a whole MULTI ... EXEC.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis

from fedmoe.store.connection import Connection


class Killed(BaseException):  # not an Exception: no handler of the project's may survive it
    """The process that sends the request is killed before it is sent."""


@dataclass
class Step:
    """What happens at the nth request that contains `word`."""

    word: bytes
    action: Callable[[], object]
    nth: int = 1
    loses_reply: bool = False

    def is_due(self, request: bytes) -> bool:
        """Count one more request."""
        self.nth -= self.word in request
        return self.nth == 0 and self.word in request


class Stepper:
    """Steps the client of one connection; nothing is sent through it yet when this is made."""

    def __init__(self, connection: Connection) -> None:
        steps: list[Step] = []
        pool = connection.client.connection_pool

        class Stepped(pool.connection_class):  # type: ignore[name-defined]  # the class is known at run time only
            def send_packed_command(self, command: Any, check_health: bool = True) -> None:
                request = command if isinstance(command, bytes) else b"".join(command)
                due = [step for step in steps if step.is_due(request)]
                for step in due:
                    steps.remove(step)
                    step.action()
                super().send_packed_command(command, check_health)
                if any(step.loses_reply for step in due):
                    self.can_read(5.0)  # so the server has executed it
                    self.disconnect()
                    raise redis.ConnectionError("the reply was lost")

        pool.connection_class = Stepped
        self._steps = steps

    def before(self, word: bytes, action: Callable[[], object], *, nth: int = 1) -> None:
        """Do `action`, with other clients, right before the nth request from now that contains `word` is sent."""
        self._steps.append(Step(word, action, nth))

    def kill_before(self, word: bytes) -> None:
        """The process dies instead of sending that request."""

        def die() -> None:
            raise Killed

        self.before(word, die)

    def lose_reply(self, word: bytes) -> None:
        """The server executes the next request that contains `word`, and the connection breaks before it answers."""
        self._steps.append(Step(word, lambda: None, loses_reply=True))

    def forget(self) -> None:
        """Drop the steps that did not happen."""
        self._steps.clear()

    @property
    def left(self) -> int:
        """Steps that did not happen yet."""
        return len(self._steps)
