"""A redis-py client that attaches to each error the commands that were sent.

Redis reports that a key or a command is refused, but not which key. redis-py prepends a pipelined command, with its
values, to the error text; this client stores the command beside the error, so that a message can name the key.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis.client import Pipeline

Words = Sequence[Any]  # a command as passed to redis-py: its name, then keys and values
_ASKED = "fedmoe_asked"


def asked(error: BaseException) -> Sequence[Words]:
    """The commands that were in flight; only the refused one if the server identified it."""
    found: Sequence[Words] = getattr(error, _ASKED, ())
    return found


def note(error: BaseException, commands: Sequence[Words]) -> None:
    """Attach these commands to an error that has none yet."""
    if not hasattr(error, _ASKED):
        setattr(error, _ASKED, commands)


@contextmanager
def noting(commands: Sequence[Words]) -> Iterator[None]:
    """Attach these commands to every redis-py or OS error in the block."""
    try:
        yield
    except (redis.RedisError, OSError) as error:
        note(error, commands)
        raise


class Client(redis.Redis):
    """A client that attaches the sent commands to its errors."""

    def execute_command(self, *words: Any, **options: Any) -> Any:
        """Send one command; returns its reply."""
        with noting([words]):
            return super().execute_command(*words, **options)  # type: ignore[no-untyped-call]  # redis-py's

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:
        """A pipeline: commands are queued and sent together."""
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
