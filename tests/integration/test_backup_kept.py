"""`fedmoe backup --keep`: dated backups, the newest are kept, and nothing else is ever removed."""

import errno
import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmoe.errors import BackupError, UnknownExpertError
from fedmoe.store.backup import BackupStore
from fedmoe.store.connection import Connection
from fedmoe.tools.backup import MANIFEST, Backup
from fedmoe.tools.kept import Rotation, back_up_and_keep
from tests.backups import NAME, content, make
from tests.errors import raises
from tests.federation import make_expert
from tests.processes import fedmoe_here

pytestmark = pytest.mark.one_server

FIRST_S = 1_769_860_800.0  # 2026-01-31T12:00:00Z
DAY_S = 86_400.0


def back_up(connection: Connection, directory: Path, day: float, keep: int = 2) -> Rotation:
    return back_up_and_keep(BackupStore(connection), directory, keep, now_s=FIRST_S + day * DAY_S)


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_the_newest_are_kept_and_restore(connection: Connection, tmp_path: Path, redis_url: str) -> None:
    """By the command itself: three runs with --keep 2 leave two, and the newest brings the expert back."""
    make(connection)
    place = tmp_path / "backups"
    command = ["backup", "--redis", redis_url, "--keep", "2", str(place)]
    first, second, third = (fedmoe_here(*command) for _ in range(3))
    written = [re.search(r"^written to (.*)$", one.stdout, re.M) for one in (first, second, third)]
    paths = [Path(match[1]) for match in written if match]
    assert [one.returncode for one in (first, second, third)] == [0, 0, 0]
    assert f"removed {paths[0]}\n" in third.stdout
    assert names(place) == [path.name for path in paths[1:]]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d{6}Z(-\d{3})?", path.name) for path in paths)
    before = content(connection)
    connection.client.flushall()
    assert fedmoe_here("restore", "--redis", redis_url, str(paths[2])).returncode == 0
    assert content(connection) == before


def test_names_follow_each_other_whatever_the_clock_says(connection: Connection, tmp_path: Path) -> None:
    """Two runs in one second, and a clock that was set back: the new backup counts as the newest."""
    make(connection)
    made = [back_up(connection, tmp_path, day).made.name for day in (0, 0, -300, 1)]
    assert made == [
        "2026-01-31T120000Z", "2026-01-31T120000Z-001", "2026-01-31T120000Z-002", "2026-02-01T120000Z",
    ]  # fmt: skip
    assert names(tmp_path) == made[2:]


def test_nothing_else_is_removed(connection: Connection, tmp_path: Path) -> None:
    """A renamed backup, a copy, one of another federation, a link, a file, and a backup with a note in it."""
    make(connection)
    oldest = back_up(connection, tmp_path, 0).made
    shutil.copytree(oldest, tmp_path / "2020-01-01T000000Z")  # a copy: its manifest has another name
    (tmp_path / "2020-01-02T000000Z").mkdir()  # no backup
    (tmp_path / "2020-01-03T000000Z").symlink_to(oldest)
    (tmp_path / "2020-01-04T000000Z").write_text("a file")
    (tmp_path / ".2020-01-05T000000Z.mine").mkdir()
    shutil.copytree(oldest, tmp_path / "before the upgrade")
    strange = back_up(connection, tmp_path, 1, keep=9).made
    (strange / NAME / "note").write_text("look at this one")
    theirs = back_up(connection, tmp_path, 2, keep=9).made
    manifest = theirs / MANIFEST
    manifest.write_text(manifest.read_text().replace('"prefix": "fedmoe"', '"prefix": "team"'))
    before = set(names(tmp_path))
    done = back_up(connection, tmp_path, 3, keep=1)
    assert done.removed == (oldest,)
    assert [path for path, _ in done.strange] == [strange]
    assert before - set(names(tmp_path)) == {oldest.name}
    assert (strange / NAME / "note").exists()
    assert set(Backup(strange).load(NAME).meta) == set(Backup(done.made).load(NAME).meta)


def test_the_last_backup_of_a_lost_expert_stays(connection: Connection, tmp_path: Path) -> None:
    """The newest backup of a lost expert, or of its earlier lineage, is never removed; older ones may be."""
    make(connection)
    make(connection, "other")
    older, last = (back_up(connection, tmp_path, day).made for day in (0, 1))
    connection.client.delete(*connection.client.keys("fedmoe:{other}:*"))
    connection.client.hdel("fedmoe:experts", "other")
    after = [back_up(connection, tmp_path, day) for day in (2, 3, 4)]
    assert after[0].removed == (older,)
    assert after[2].held == ((last, "other"),)
    make_expert(connection, "other")  # from zero: another lineage
    after += [back_up(connection, tmp_path, day) for day in (5, 6, 7)]
    assert after[-1].held == ((last, "other"),)
    assert names(tmp_path) == [last.name, after[-2].made.name, after[-1].made.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=128k", "none", str(place)]
    done = subprocess.run(["mount", *options], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here ({done.stderr.strip()})")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_one_sentence_and_removes_nothing(
    connection: Connection, small_disk: Path, redis_url: str
) -> None:
    """A real one: the old backups stay, whole, though there are more than --keep says; nothing half is left."""
    make(connection)
    there = 0
    while not (
        done := fedmoe_here("backup", "--redis", redis_url, "--keep", "99", str(small_disk))
    ).returncode:
        there += 1
    assert there > 1
    before = names(small_disk)
    done = fedmoe_here("backup", "--redis", redis_url, "--keep", "1", str(small_disk))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("fedmoe: no space left for the backup")
    assert names(small_disk) == before
    assert [set(Backup(small_disk / name).load(NAME).meta) for name in before]
    shutil.rmtree(small_disk / before[0])
    again = fedmoe_here("backup", "--redis", redis_url, "--keep", "1", str(small_disk))
    assert (again.returncode, len(names(small_disk))) == (0, 1)


@pytest.mark.parametrize("at", [3, 5])
def test_what_a_killed_run_left_is_removed_by_the_next(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Killed while it writes: the next run removes that, but no file that somebody put there."""
    make(connection)
    sync, calls = os.fsync, []

    def die(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == at:
            raise KeyboardInterrupt
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", die)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if SIGKILL had come
    with pytest.raises(KeyboardInterrupt):
        back_up(connection, tmp_path, 0)
    (left,) = names(tmp_path)
    assert left.startswith(".2026-01-31T120000Z.")
    shutil.copytree(tmp_path / left, tmp_path / ".2026-01-30T120000Z.00000000")
    (tmp_path / ".2026-01-30T120000Z.00000000" / NAME / "note").write_text("mine")
    made = back_up(connection, tmp_path, 1).made
    assert names(tmp_path) == [".2026-01-30T120000Z.00000000", made.name]
    assert names(tmp_path / ".2026-01-30T120000Z.00000000" / NAME) == ["note"]


def test_a_removal_that_is_cut_off_leaves_no_half_backup(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old backup's name goes first."""
    make(connection)
    old = back_up(connection, tmp_path, 0).made

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        done = back_up(connection, tmp_path, 1, keep=1)
    assert done.strange == ((old, "Input/output error"),)
    assert not old.exists()
    newest = back_up(connection, tmp_path, 2, keep=1).made
    assert names(tmp_path) == [newest.name]


def test_refusals(connection: Connection, tmp_path: Path, redis_url: str) -> None:
    """A second run at once, a part of the federation, an empty one, a place that is a file: one sentence each."""
    with raises(BackupError, about="experts"):
        back_up(connection, tmp_path, 0)
    make(connection)
    opened = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(opened, fcntl.LOCK_EX)
    with raises(BackupError, about="lock", cause=BlockingIOError):
        back_up(connection, tmp_path, 0)
    os.close(opened)
    (tmp_path / "file").write_text("")
    with raises(BackupError, about="directory", cause=FileExistsError):
        back_up(connection, tmp_path / "file", 0)
    part = fedmoe_here("backup", "--redis", redis_url, "--keep", "1", "--expert", NAME, str(tmp_path / "b"))
    assert (part.returncode, part.stderr.count("\n")) == (2, 1)
    connection.client.delete(connection.keys.expert(NAME).meta)
    with raises(UnknownExpertError, about=NAME):
        back_up(connection, tmp_path, 0)
    assert names(tmp_path) == ["file"]
