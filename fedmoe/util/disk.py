"""Files that are there whole or not at all."""

import os
import secrets
from pathlib import Path


def to_disk(path: Path) -> None:
    """Wait until a file, or what a directory lists, has reached the disk.

    Raises:
        OSError: if it cannot.
    """
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_whole(file: Path, content: bytes | memoryview) -> None:
    """Write a file so that after a crash at any moment either the old or the new one is there.

    Raises:
        OSError: if the disk is full or gone; the old file, if there was one, is still there.
    """
    fresh = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with fresh.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(file)
        to_disk(file.parent)
    finally:
        fresh.unlink(missing_ok=True)
