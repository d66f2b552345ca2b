"""Waiting for the disk."""

import os
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
