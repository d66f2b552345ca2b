"""Text that others wrote, made safe to print."""

from pathlib import Path

MAX_TEXT_CHARS = 300


def printable(raw: bytes | str, limit: int | None = MAX_TEXT_CHARS) -> str:
    """What anybody may have written, as one line that can neither move a cursor nor colour a terminal.

    What is not printable is escaped, line breaks too. It is truncated to `limit` characters; None is no limit.
    """
    text = raw.decode(errors="backslashreplace") if isinstance(raw, bytes) else raw
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return safe if limit is None or (len(safe) <= limit and len(text) <= limit) else safe[:limit] + "..."


def printable_lines(text: str) -> str:
    """The same of a text of several lines, whole: a message of ours that quotes what others wrote."""
    return "\n".join(printable(line, None) for line in text.split("\n"))


def shown(name: Path | str) -> str:
    """A path as text that can be printed: file names may be any bytes."""
    return str(name).encode(errors="backslashreplace").decode()
