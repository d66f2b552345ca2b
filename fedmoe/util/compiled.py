"""C source of this package as a shared library, compiled on this machine by whatever compiler it has."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from fedmoe.errors import SettingsError
from fedmoe.util.disk import cache_directory, write_whole

# Each operation rounds by itself. Nothing of a C library is needed, neither its headers nor to link with it.
_OPTIONS = ("-O3", "-std=c11", "-ffp-contract=off", "-ffreestanding", "-fPIC", "-shared")
_LINK = ("-nostdlib",) if sys.platform == "linux" else ()
_COMPILE_S = 60.0
_DIGEST_BYTES = hashlib.sha256().digest_size  # before the library, in the file that is kept

logger = logging.getLogger(__name__)


def load(source: Path, processor: str = "") -> ctypes.CDLL:
    """Load the library of a C file, which is compiled unless that was done before; `processor` is for -march.

    It is kept in the cache directory. If that cannot be written, or runs no programs, each process compiles it.

    Raises:
        SettingsError: if there is no compiler, or it fails.
    """
    content = source.read_bytes()
    key = (content, *(word.encode() for word in (*_OPTIONS, *_LINK, processor, platform.machine())))
    name = f"{source.stem}-{hashlib.sha256(b' '.join(key)).hexdigest()[:16]}"
    kept = _kept(name)
    try:
        with tempfile.TemporaryDirectory(prefix="fedmoe-") as work:
            made = Path(work, name)
            if kept is not None and (library := _copied(kept, made)):
                return library
            _compile(source, made, processor)
            library = ctypes.CDLL(str(made))
            _keep(made, kept)
            return library
    except OSError as error:
        raise SettingsError(
            f"{source.name} cannot be compiled and loaded ({error}): set TMPDIR to a directory that this process may "
            "write, and that may run programs", about="TMPDIR",
        ) from error  # fmt: skip


def _kept(name: str) -> Path | None:
    try:
        return cache_directory() / name
    except RuntimeError:  # this user has no home
        return None


def _copied(kept: Path, made: Path) -> ctypes.CDLL | None:
    """Load a copy of a kept library, which nobody else can exchange; None if it cannot be used."""
    try:
        with kept.open("rb") as file:
            if not _is_ours(os.fstat(file.fileno())):
                return None
            digest, content = file.read(_DIGEST_BYTES), file.read()
        if hashlib.sha256(content).digest() != digest:  # loading it could end this process
            raise OSError("it is damaged")
        made.write_bytes(content)
        return ctypes.CDLL(str(made))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        logger.info("%s cannot be loaded (%s); it is compiled again", kept, error)
        return None


def _is_ours(found: os.stat_result) -> bool:
    """True if nobody else could have written this file."""
    return found.st_uid in (0, os.getuid()) and not found.st_mode & 0o022


def _keep(made: Path, kept: Path | None) -> None:
    try:
        if kept is None:
            raise OSError("there is no home directory")
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = made.read_bytes()
        write_whole(kept, hashlib.sha256(content).digest() + content, mode=0o644)
    except OSError as error:
        logger.info(
            "%s is compiled at each start, for it cannot be kept in %s (%s): set XDG_CACHE_HOME to a directory that "
            "is writable", made.name, kept and kept.parent, error.strerror or error,
        )  # fmt: skip


def _compile(source: Path, out: Path, processor: str) -> None:
    command = compiler()
    march = processor.replace("-", "_") if "ziglang" in command else processor
    options = (*_OPTIONS, *_LINK, *([f"-march={march}"] if march else []))
    work = str(out.parent)
    try:
        done = subprocess.run(
            [*command, *options, str(source), "-o", str(out)], capture_output=True, timeout=_COMPILE_S, check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": work, "ZIG_LOCAL_CACHE_DIR": work},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SettingsError(f"the compiler {command[0]} does not run ({error})", about="compiler") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").split("\n")
        why = next((line for line in lines if "error:" in line), lines[0])[:200]
        raise SettingsError(
            f"the compiler `{shlex.join(command)}` fails with exit code {done.returncode} ({why})",
            about="compiler",
        )


def compiler() -> tuple[str, ...]:
    """The command of a C compiler: what CC names, else the first on PATH, else that of the extra `fast`.

    Raises:
        SettingsError: if there is none, or CC is not a command.
    """
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise SettingsError(f"CC is not a command ({error})", about="compiler") from error
    if named:
        return tuple(named)
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return (path,)
    if find_spec("ziglang"):
        return (sys.executable, "-P", "-m", "ziglang", "cc")
    raise SettingsError(
        "there is no C compiler: install gcc or clang, or `pip install 'fedmoe[fast]'`", about="compiler"
    )
