"""Reads untrusted content of Redis as text that is safe to print."""

from collections.abc import Mapping
from typing import Any

from redis.exceptions import NoPermissionError

from fedmoe.errors import RedisUnavailableError
from fedmoe.store.connection import Connection
from fedmoe.util.text import printable

_KEYLESS = ("CONFIG GET",)
DENIED = "this user may not"

Command = tuple[str | bytes | int, ...]


def ask(connection: Connection, commands: Mapping[Any, Command]) -> dict[Any, Any]:
    """Send all commands in one pipeline, one for each slot of a Redis Cluster; a refused command's reply is its error.

    The key of a command is its second word. If a part of a cluster cannot be reached, the error is the reply, too.

    Raises:
        RedisUnavailableError: if nothing can be reached.
    """
    pipelines: dict[Connection, dict[Any, Command]] = {}
    for name, command in commands.items():
        pipelines.setdefault(_at(connection, command), {})[name] = command
    replies: dict[Any, Any] = {}
    failed: list[RedisUnavailableError] = []
    for there, some in pipelines.items():
        try:
            replies |= _ask_one(there, some)
        except RedisUnavailableError as error:
            failed.append(error)
            replies |= dict.fromkeys(some, error)
    if failed and len(failed) == len(pipelines):
        raise failed[0]
    return {name: replies[name] for name in commands}


def _at(connection: Connection, command: Command) -> Connection:
    if len(command) == 1 or command[0] in _KEYLESS:
        return connection
    key = command[1]
    return connection.at(key.decode(errors="surrogateescape") if isinstance(key, bytes) else str(key))


def _ask_one(connection: Connection, commands: Mapping[Any, Command]) -> dict[Any, Any]:
    with connection.errors(), connection.client.pipeline(transaction=False) as pipe:
        for command in commands.values():
            pipe.execute_command(*command)
        return dict(zip(commands, pipe.execute(raise_on_error=False), strict=True))


def texts(fields: Mapping[bytes, bytes]) -> dict[str, str]:
    """The fields of a hash or an entry as `printable` texts."""
    return {printable(key): printable(value) for key, value in fields.items()}


def why(error: Exception) -> str:
    """An error reply as the end of a sentence."""
    text = str(error)
    if text.startswith("WRONGTYPE"):
        return "the key is of the wrong type: was it written by something else?"
    return DENIED if isinstance(error, NoPermissionError) else printable(text)
