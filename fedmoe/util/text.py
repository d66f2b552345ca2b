"""Makes untrusted text safe to print."""

from pathlib import Path

MAX_TEXT_CHARS = 300


def printable(raw: bytes | str, limit: int | None = MAX_TEXT_CHARS) -> str:
    """Untrusted text as one line that can neither move a cursor nor colour a terminal.

    Characters that are not printable are escaped, line breaks too. The line is cut to `limit` characters; None means
    no limit.
    """
    text = raw.decode(errors="backslashreplace") if isinstance(raw, bytes) else raw
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return safe if limit is None or (len(safe) <= limit and len(text) <= limit) else safe[:limit] + "..."


def printable_lines(text: str) -> str:
    """Like `printable`, for a whole text of several lines: a FedMoE message that quotes untrusted text."""
    return "\n".join(printable(line, None) for line in text.split("\n"))


def counted(n: int, thing: str) -> str:
    """A number of things in English: 1 step, 2 steps."""
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def shown(name: Path | str) -> str:
    """A path as text that can be printed: a file name may hold any bytes."""
    return str(name).encode(errors="backslashreplace").decode()
