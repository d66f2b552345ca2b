"""Atomic and durable file writes, and where a user's cache lies."""

import os
import secrets
from collections.abc import Iterable
from functools import partial
from pathlib import Path


def cache_directory() -> Path:
    """Directory of what this user's processes can make again: $XDG_CACHE_HOME/fedmoe, else ~/.cache/fedmoe.

    Raises:
        RuntimeError: if the user has no home directory.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedmoe"


def to_disk(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, has reached the disk (fsync).

    Raises:
        OSError: if the fsync fails.
    """
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_file(file: Path, chunks: Iterable[bytes | memoryview], *, mode: int = 0o666) -> None:
    """Write a new file of at most this mode, and wait until its bytes have reached the disk.

    Its name in the directory is durable only after `to_disk` of the directory.

    Raises:
        OSError: if the disk is full or gone.
    """
    with open(file, "xb", opener=partial(os.open, mode=mode)) as out:
        out.writelines(chunks)
        out.flush()
        os.fsync(out.fileno())


def put_in_place(fresh: Path, file: Path) -> None:
    """Replace `file` by `fresh`, which is on disk already, and wait until the rename is on disk too.

    Raises:
        OSError: if the disk is full or gone; the old file stays until the rename.
    """
    fresh.replace(file)
    to_disk(file.parent)


def write_whole(file: Path, content: bytes | memoryview, *, mode: int = 0o666) -> None:
    """Write a file atomically: after a crash at any moment, either the old or the new file exists.

    Raises:
        OSError: if the disk is full or gone; an old file stays.
    """
    fresh = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        write_file(fresh, [content], mode=mode)
        put_in_place(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)
