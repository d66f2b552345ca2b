"""redis-py's client, which notes with each error what was asked of the server.

Redis says that a key or a command is refused, but not which key. redis-py puts the words of a pipelined command before
the error, values included; here they stand beside it, so that a sentence can name the key and the error stays whole.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis.client import Pipeline

Words = Sequence[Any]  # a command as redis-py was given it: its name, then keys and values
_ASKED = "fedmoe_asked"


def asked(error: BaseException) -> Sequence[Words]:
    """The commands that were under way; the refused one alone if the server said which it was."""
    found: Sequence[Words] = getattr(error, _ASKED, ())
    return found


def note(error: BaseException, commands: Sequence[Words]) -> None:
    """Note what was asked, unless something more exact is known."""
    if not hasattr(error, _ASKED):
        setattr(error, _ASKED, commands)


@contextmanager
def noting(commands: Sequence[Words]) -> Iterator[None]:
    """Note these commands with every error that comes."""
    try:
        yield
    except (redis.RedisError, OSError) as error:
        note(error, commands)
        raise


class Client(redis.Redis):
    """A client whose errors are noted."""

    def execute_command(self, *words: Any, **options: Any) -> Any:
        """Send one command; its reply."""
        with noting([words]):
            return super().execute_command(*words, **options)  # type: ignore[no-untyped-call]  # redis-py's

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        """Queue commands, to be sent together."""
        return _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


class _Pipeline(Pipeline):
    def immediate_execute_command(self, *words: Any, **options: Any) -> Any:
        with noting([words]):
            return super().immediate_execute_command(*words, **options)  # type: ignore[no-untyped-call]  # redis-py's

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        with noting([words for words, _ in self.command_stack]):
            return super().execute(raise_on_error)

    def annotate_exception(self, exception: Exception, number: int, command: Words) -> None:
        setattr(exception, _ASKED, [command])
