"""Text that others wrote, made safe to print."""

from pathlib import Path


def printable(text: str) -> str:
    """`text` with every control character escaped, so that it can neither move a cursor nor colour a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def shown(name: Path | str) -> str:
    """A path as text that can be printed: file names may be any bytes."""
    return str(name).encode(errors="backslashreplace").decode()
