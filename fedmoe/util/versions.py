"""A directory whose files are replaced together, although readers open them one by one.

    OUT/NAME                     a link to .fedmoe/current/NAME, for each file
    OUT/.fedmoe/current          a link to the present version; switched by one rename
    OUT/.fedmoe/v-0123456789ab   the files of one version, which never change

OUT itself is never replaced, so it may be a mount or hold other files. A reader that opens two files under OUT during a
replacement can get one file of each version, because every open follows the links. A reader that resolves `current`
once (`version_of`) gets one version; a replaced version stays for KEEP_S.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fedmoe.util.disk import to_disk

HOME, CURRENT = ".fedmoe", "current"
KEEP_S = 120.0  # time for a reader that has resolved the link to open its last file
_VERSION, _UNFINISHED = "v-", "new-"


def version_of(directory: Path) -> Path:
    """The directory of the present version; `directory` itself if it holds no versions."""
    current = directory / HOME / CURRENT
    return current.resolve() if current.is_symlink() else directory


def replace_together(directory: Path, write: Callable[[Path], None], *, first: str, last: str) -> None:
    """Replace the files of the present version in `directory` by those that `write` writes, in one step.

    Other files stay, unless they have the name of one that is written.

    If the process is killed, the old files stay, and the next call removes leftovers under .fedmoe. Concurrent calls
    run one after the other. Plain files under these names become the first version.

    Args:
        directory: created if it does not exist.
        write: writes the files to the empty directory that it is given, among them `first` and `last`.
        first: name of the file that appears first in a new directory.
        last: name of the one that appears last: the file that a reader looks for first.

    Raises:
        OSError: if a file cannot be written, or the file system has no symbolic links.
    """
    made = not directory.exists()
    home = directory / HOME
    home.mkdir(parents=True, exist_ok=True)
    try:
        with _alone(home):
            try:
                _replace(directory, write, first, last)
            finally:
                _remove_leftovers(home)
    except BaseException:
        if not os.path.lexists(home / CURRENT):
            shutil.rmtree(home, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):  # another process has written to the directory
                directory.rmdir()
        raise


def _replace(directory: Path, write: Callable[[Path], None], first: str, last: str) -> None:
    home = directory / HOME
    _remove_leftovers(home)
    fresh = _unfinished(home)
    fresh.mkdir()
    write(fresh)
    to_disk(fresh)
    others = sorted(path.name for path in fresh.iterdir() if path.name not in (first, last))
    names = [first, *others, last]
    _adopt_plain_files(directory, names)
    _point(home, _finish(fresh))
    for name in names:
        _link(directory, name)
    for path in directory.iterdir():  # a file of the version before that the new one has not
        if _is_link_to_current(path) and not path.exists():
            path.unlink()
    to_disk(directory)


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Hold a lock against concurrent replacements, if the file system has locks."""
    opened = os.open(home, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _unfinished(home: Path) -> Path:
    return home / f"{_UNFINISHED}{secrets.token_hex(6)}"


def _finish(unfinished: Path) -> Path:
    """Give a complete version its final name."""
    version = unfinished.with_name(_VERSION + unfinished.name.removeprefix(_UNFINISHED))
    unfinished.rename(version)
    to_disk(version.parent)
    return version


def _point(home: Path, version: Path) -> None:
    """Make `version` the current one with one rename."""
    old = (home / CURRENT).resolve()
    if old.is_dir():
        os.utime(old)  # KEEP_S counts from now: a reader may still open its files
    _place_link(home, version.name, home / CURRENT)


def _adopt_plain_files(directory: Path, names: Sequence[str]) -> None:
    """Turn plain files into a version, so that one rename can then replace all of them."""
    plain = [
        name for name in names if (directory / name).is_file() and not _is_link_to_current(directory / name)
    ]
    if not plain:
        return
    home = directory / HOME
    adopted = _unfinished(home)
    adopted.mkdir()
    for name in names:
        if (directory / name).is_file():
            shutil.copy2(directory / name, adopted / name)
    _point(home, _finish(adopted))
    for name in plain:
        _link(directory, name)


def _is_link_to_current(path: Path) -> bool:
    return path.is_symlink() and os.readlink(path) == f"{HOME}/{CURRENT}/{path.name}"


def _link(directory: Path, name: str) -> None:
    if not _is_link_to_current(directory / name):
        _place_link(directory / HOME, f"{HOME}/{CURRENT}/{name}", directory / name)


def _place_link(home: Path, target: str, path: Path) -> None:
    """Put a link to `target` at `path`, replacing any file or link there."""
    fresh = _unfinished(home)
    fresh.symlink_to(target)
    fresh.replace(path)


def _remove_leftovers(home: Path) -> None:
    """Remove leftovers of killed calls, and versions that were replaced more than KEEP_S ago."""
    current = home / CURRENT
    if not current.is_symlink() and current.exists():  # OUT was copied with its links followed
        shutil.rmtree(current, ignore_errors=True)
    now = time.time()
    for path in home.iterdir():
        if path.name == CURRENT or path == current.resolve():
            continue
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        elif not path.name.startswith(_VERSION) or now - path.stat().st_mtime > KEEP_S:
            shutil.rmtree(path, ignore_errors=True)
