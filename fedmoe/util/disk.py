"""Files that are there whole or not at all."""

import os
import secrets
from collections.abc import Iterable
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


def write_file(file: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file that is not there yet, and wait until its bytes have reached the disk.

    That it is in its directory is known after `to_disk` of that.

    Raises:
        OSError: if the disk is full or gone.
    """
    with file.open("xb") as out:
        out.writelines(chunks)
        out.flush()
        os.fsync(out.fileno())


def put_in_place(fresh: Path, file: Path) -> None:
    """Give a file that is on disk the name of another one, in its place, and wait until that is on disk, too.

    Raises:
        OSError: if the disk is full or gone; before the new name is there, the old file is.
    """
    fresh.replace(file)
    to_disk(file.parent)


def write_whole(file: Path, content: bytes | memoryview) -> None:
    """Write a file so that after a crash at any moment either the old or the new one is there.

    Raises:
        OSError: if the disk is full or gone; the old file, if there was one, is still there.
    """
    fresh = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        write_file(fresh, [content])
        put_in_place(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)
