"""What anybody may have written to Redis, read as texts that are safe to show."""

from collections.abc import Mapping
from typing import Any

from redis.exceptions import NoPermissionError

from fedmoe.store.connection import Connection

MAX_TEXT_CHARS = 300
DENIED = "this user may not"

Command = tuple[str | bytes | int, ...]


def ask(connection: Connection, commands: Mapping[Any, Command]) -> dict[Any, Any]:
    """Send everything at once; a command that Redis refuses has its error as reply."""
    if not commands:
        return {}
    with connection.errors(), connection.client.pipeline(transaction=False) as pipe:
        for command in commands.values():
            pipe.execute_command(*command)
        return dict(zip(commands, pipe.execute(raise_on_error=False), strict=True))


def printable(raw: bytes | str, limit: int = MAX_TEXT_CHARS) -> str:
    """What anybody may have written, safe for a terminal: what is not printable is escaped, and it is truncated."""
    text = raw.decode(errors="backslashreplace") if isinstance(raw, bytes) else raw
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return safe if len(safe) <= limit and len(text) <= limit else safe[:limit] + "..."


def texts(fields: Mapping[bytes, bytes]) -> dict[str, str]:
    """A hash or the fields of an entry, as `printable` texts."""
    return {printable(key): printable(value) for key, value in fields.items()}


def why(error: Exception) -> str:
    """An error reply as the end of a sentence."""
    text = str(error)
    if text.startswith("WRONGTYPE"):
        return "the key is of the wrong type: was it written by something else?"
    return DENIED if isinstance(error, NoPermissionError) else printable(text)
