"""Reads untrusted content of Redis as text that is safe to print."""

from collections.abc import Mapping
from typing import Any

from redis.exceptions import NoPermissionError

from fedmoe.store.connection import Connection
from fedmoe.util.text import printable

DENIED = "this user may not"

Command = tuple[str | bytes | int, ...]


def ask(connection: Connection, commands: Mapping[Any, Command]) -> dict[Any, Any]:
    """Send all commands in one pipeline; a refused command's reply is its error."""
    if not commands:
        return {}
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
