"""A directory of dated backups, of which the newest are kept (`fedmoe backup --keep`).

    DIR/2026-01-31T120000Z   a backup, made at this time (UTC); its manifest says `kept_as`: this name
    DIR/.2026-01-31T120000Z.0123abcd   one that is being written or removed

Nothing is removed before the new backup is whole, and only what this module wrote: a backup whose manifest has its name
and the federation's prefix, and of it only the files of a backup. So a backup that was renamed, and any other file in
DIR, stays for ever.

The newest backup that holds an expert of a lineage is kept, however old it is: an expert that was lost or created again
must not disappear from the backups by itself.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fedmoe.errors import BackupError, FedMoEError
from fedmoe.store.backup import BackupStore
from fedmoe.tools.backup import FILES, MANIFEST, OPTIMIZER_FILE, Backup, Saved, back_up

_STAMP = r"\d{4}-\d\d-\d\dT\d{6}Z"
_NAME = re.compile(rf"({_STAMP})(?:-(\d{{3,9}}))?")
_LEFTOVER = re.compile(rf"\.{_NAME.pattern}\.[0-9a-f]{{8}}")
_FILES = (*FILES, OPTIMIZER_FILE)


@dataclass(frozen=True, slots=True)
class Kept:
    """A backup of the directory. `experts`: the (name, lineage) of each expert in it."""

    path: Path
    experts: frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Rotation:
    """What a run did: the new backup, the removed ones, and those that are kept for an expert only they hold.

    `strange`: old backups that cannot be removed whole, because they hold other files too, or because the file system
    refuses it; with the reason.
    """

    made: Path
    removed: tuple[Path, ...]
    held: tuple[tuple[Path, str], ...]
    strange: tuple[tuple[Path, str], ...]


def back_up_and_keep(
    store: BackupStore,
    directory: Path,
    keep: int,
    *,
    now_s: float,
    report: Callable[[str, Saved], None] = lambda name, saved: None,
) -> Rotation:
    """Write a backup of all experts to a new dated directory in `directory`, then remove old ones.

    Args:
        store: of the federation.
        directory: created if it does not exist; may hold other files.
        keep: how many backups stay, the new one included; at least 1.
        now_s: seconds since 1970.
        report: called for each expert that was read and written.

    Raises:
        BackupError: if the backup cannot be made, or another run is at work here; nothing was removed then.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackupError(
            f"cannot make the directory {directory} for backups ({error.strerror})", about="directory"
        ) from error
    with _alone(directory):
        _remove_leftovers(directory)
        made = directory / _next_name(directory, now_s)
        back_up(store, made, report=report, kept_as=made.name)
        return _rotate(directory, made, keep, store.keys.prefix)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold a lock on the directory, if its file system has locks."""
    try:
        opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise BackupError(f"cannot read {directory} ({error.strerror})", about="directory") from error
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BackupError(
                f"another `fedmoe backup --keep` is at work in {directory}: wait until it has ended",
                about="lock",
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise
        yield
    finally:
        os.close(opened)


def _order(name: str) -> tuple[str, int]:
    match = _NAME.fullmatch(name)
    assert match is not None
    return match[1], int(match[2] or 0)


def _next_name(directory: Path, now_s: float) -> str:
    """A name after all that are there, also if the clock was set back or two runs share a second."""
    stamp = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime(now_s))
    newest = max((_order(name) for name in os.listdir(directory) if _NAME.fullmatch(name)), default=("", 0))
    return stamp if stamp > newest[0] else f"{newest[0]}-{newest[1] + 1:03d}"


def _rotate(directory: Path, made: Path, keep: int, prefix: str) -> Rotation:
    removed, held, strange = [], [], []
    seen: set[tuple[str, str]] = set()
    for number, one in enumerate(_ours(directory, prefix)):
        only_here, seen = one.experts - seen, seen | one.experts
        if number < keep or one.path == made:
            continue
        if only_here:
            held.append((one.path, ", ".join(sorted(name for name, _ in only_here))))
        elif reason := _remove(one.path):
            strange.append((one.path, reason))
        else:
            removed.append(one.path)
    return Rotation(made, tuple(removed), tuple(held), tuple(strange))


def _ours(directory: Path, prefix: str) -> list[Kept]:
    """The backups that `back_up_and_keep` wrote here for this federation, the newest first."""
    found = []
    names = sorted(filter(_NAME.fullmatch, os.listdir(directory)), key=_order, reverse=True)
    for path in (directory / name for name in names):
        if path.is_symlink() or not path.is_dir():
            continue
        with suppress(FedMoEError, OSError, ValueError, AttributeError):
            backup = Backup(path)
            if (
                json.loads((path / MANIFEST).read_bytes()).get("kept_as") == path.name
                and backup.prefix == prefix
            ):
                experts = frozenset((name, saved.lineage) for name, saved in backup.experts.items())
                found.append(Kept(path, experts))
    return found


def _remove(path: Path) -> str:
    """Remove a backup; "" or the reason why it stays. Its name goes first, so that no half of it is taken for whole."""
    if strange := _strangers(path):
        return f"it holds {strange[0]}, which is not of a backup"
    gone = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.rename(gone)
        _remove_files(gone)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _strangers(path: Path) -> Sequence[str]:
    """The files in a backup that are not a backup's."""
    experts = [one for one in path.iterdir() if one.is_dir() and not one.is_symlink()]
    others = [one for one in path.iterdir() if one not in experts and one.name != MANIFEST]
    others += [
        one for expert in experts for one in expert.iterdir() if one.name not in _FILES or one.is_dir()
    ]
    return sorted(str(one.relative_to(path)) for one in others)


def _remove_files(path: Path) -> None:
    """Remove the files of a backup, and its directories if nothing else is in them."""
    for expert in [one for one in path.iterdir() if one.is_dir() and not one.is_symlink()]:
        for name in _FILES:
            (expert / name).unlink(missing_ok=True)
        with suppress(OSError):  # something else is in it
            expert.rmdir()
    (path / MANIFEST).unlink(missing_ok=True)
    with suppress(OSError):
        path.rmdir()


def _remove_leftovers(directory: Path) -> None:
    """Remove what a killed run was writing or removing; the lock says that no run is at work."""
    for name in filter(_LEFTOVER.fullmatch, os.listdir(directory)):
        path = directory / name
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):
                _remove_files(path)
