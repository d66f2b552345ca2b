"""fedmoe.util.disk: after a crash the old or the new file is there, and so is its name."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmoe.util.disk import put_in_place, write_file, write_whole


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The inodes of what reached the disk, in order."""
    found: list[int] = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        found.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return found


def renamed(file: Path) -> None:
    fresh = file.with_suffix(".new")
    write_file(fresh, [b"ne", b"w"])
    put_in_place(fresh, file)


@pytest.mark.parametrize("replace", [lambda file: write_whole(file, b"new"), renamed])
def test_bytes_reach_the_disk_before_the_name_and_the_name_at_last(
    tmp_path: Path, synced: list[int], replace: Callable[[Path], None]
) -> None:
    """A name without bytes, or bytes whose name a crash takes back, would be neither the old nor the new file."""
    file = tmp_path / "file"
    file.write_bytes(b"old")
    replace(file)
    assert file.read_bytes() == b"new"
    assert synced == [file.stat().st_ino, tmp_path.stat().st_ino]
    assert os.listdir(tmp_path) == ["file"]


def test_disk_that_refuses_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing beside it."""

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "file"
    file.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, check=lambda error: error.errno == errno.ENOSPC):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    """Only `put_in_place` and `write_whole` replace."""
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "file", [b"new"])
