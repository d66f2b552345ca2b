"""The directory that `fedmoe gateway follow` writes to.

    DIR/gateway-v12-3fa9c1e0/   one version as an adapter's directory; its files never change
    DIR/current                 a link to the version that is served; moved by one rename
    DIR/.loaded                 the versions that `follow` has loaded into a server, and not unloaded
    DIR/.lock                   held while `follow` runs

A version's name says its number, and by its end from which commits and with which options it was made. So a name
stands for one content, and no server ever loads another content under a name that it knows.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedmoe.errors import SettingsError
from fedmoe.tools.export import Export
from fedmoe.tools.export_files import CONFIG_FILE, CURRENT, INFO_FILE, LOCK, explain, model_in, write_files
from fedmoe.util.disk import to_disk, write_whole

LOADED = ".loaded"
_NEW = ".new-"


class VersionDirectory:
    """The versions in a directory, under names that begin with `prefix`; only one process may have it open.

    Raises:
        SettingsError: if the directory holds a model or an adapter, is in use, or cannot be written.
    """

    def __init__(self, root: Path, prefix: str) -> None:
        self.root = root.resolve()
        self._name = re.compile(rf"{re.escape(prefix)}-v\d+-[0-9a-f]{{8}}")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._check()
            self._lock = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            self._take_lock()
            for path in self.root.glob(f"{_NEW}*"):  # of a process that was killed
                shutil.rmtree(path, ignore_errors=True)
        except OSError as error:
            raise SettingsError(explain(error, self.root, 0), about="disk") from error

    def close(self) -> None:
        """Let another process open it."""
        os.close(self._lock)

    def _check(self) -> None:
        if found := model_in(self.root) or (CONFIG_FILE if (self.root / CONFIG_FILE).exists() else ""):
            raise SettingsError(
                f"{self.root} holds a model or an adapter ({found}): choose a directory for the versions alone",
                about=found,
            )
        current = self.root / CURRENT
        if current.exists() and not current.is_symlink():
            raise SettingsError(
                f"{current} is not a link that FedMoE made: choose another directory", about=CURRENT
            )

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise SettingsError(
                    f"another `fedmoe gateway follow` writes to {self.root}: stop it, or choose another directory",
                    about="lock",
                ) from error  # a file system without locks is used without one

    def is_version(self, name: str) -> bool:
        """True if this is the name of a version that may lie or have lain here."""
        return self._name.fullmatch(name) is not None

    @property
    def current(self) -> str:
        """The name of the version that is served, "" if there is none."""
        with suppress(OSError):
            name = os.readlink(self.root / CURRENT)
            if self.is_version(name) and self.has(name):
                return name
        return ""

    def has(self, name: str) -> bool:
        """True if this version is there; it is then complete."""
        return (self.root / name / INFO_FILE).is_file()

    def path(self, name: str) -> Path:
        """The directory of a version."""
        return self.root / name

    def info(self, name: str) -> dict[str, Any]:
        """Content of a version's fedmoe.json; empty if it cannot be read."""
        with suppress(OSError, ValueError):
            content = json.loads((self.path(name) / INFO_FILE).read_bytes())
            if isinstance(content, dict):
                return content
        return {}

    @property
    def loaded(self) -> set[str]:
        """The versions that were loaded into a server from here; where nobody has noted it, the current one."""
        with suppress(OSError, ValueError):
            content = json.loads((self.root / LOADED).read_bytes())
            if isinstance(content, list):
                return {name for name in content if isinstance(name, str)}
        return {self.current} - {""}

    def note_loaded(self, names: set[str]) -> None:
        """Note which versions were loaded into a server from here.

        Raises:
            SettingsError: if the disk refuses.
        """
        if names == self.loaded and (self.root / LOADED).exists():
            return
        try:
            write_whole(self.root / LOADED, json.dumps(sorted(names)).encode())
        except OSError as error:
            raise SettingsError(explain(error, self.root, 0), about="disk") from error

    def add(self, name: str, export: Export) -> None:
        """Write a version; it appears complete or not at all.

        Raises:
            SettingsError: if the disk refuses.
        """
        fresh = self.root / f"{_NEW}{secrets.token_hex(4)}"
        try:
            fresh.mkdir()
            write_files(fresh, export)
            to_disk(fresh)
            fresh.rename(self.path(name))
            to_disk(self.root)
        except OSError as error:
            raise SettingsError(explain(error, self.root, len(export.file)), about="disk") from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def switch(self, name: str) -> None:
        """Make a version the current one, by one rename.

        Raises:
            SettingsError: if the disk refuses.
        """
        fresh = self.root / f"{_NEW}{secrets.token_hex(4)}"
        try:
            fresh.symlink_to(name)
            fresh.replace(self.root / CURRENT)
            to_disk(self.root)
        except OSError as error:
            raise SettingsError(explain(error, self.root, 0), about="disk") from error

    def prune(self, keep: int, needed: set[str]) -> None:
        """Remove all versions but the `keep` newest and those that are needed."""
        versions = [path for path in self.root.iterdir() if self.is_version(path.name)]
        versions.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in versions[keep:]:
            if path.name not in needed:
                shutil.rmtree(path, ignore_errors=True)
