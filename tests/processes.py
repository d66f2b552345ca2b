"""Real `fedmoe` processes for tests: start, read what they print, wait for something, end."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from fedmoe.cli.main import main


def environment(**extra: str) -> dict[str, str]:
    """One thread, no hub, no settings of the person who runs the tests."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FEDMOE_")}
    return clean | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | extra


def fedmoe(*arguments: str, timeout_s: float = 100.0, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "fedmoe.cli.main", *arguments],
        env=environment(**extra), capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


def fedmoe_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in this process, which need not import transformers for 5 s; stderr lacks its log."""
    before, code = sys.argv, 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    sys.argv = ["fedmoe", *arguments]
    try:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@contextmanager
def running(
    log: Path,
    *arguments: str,
    program: Sequence[str] = ("-m", "fedmoe.cli.main"),
    cwd: Path | None = None,
    **extra: str,
) -> Iterator[subprocess.Popen[bytes]]:
    """A command in the background, its output in `log`; killed at the end if it still runs, or is stopped."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            env=environment(**extra), stdout=out, stderr=subprocess.STDOUT, start_new_session=True, cwd=cwd,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def is_stopped(process: subprocess.Popen[bytes]) -> bool:
    """True once SIGSTOP has stopped it."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def terminate(process: subprocess.Popen[bytes], *, timeout_s: float = 60.0) -> int:
    """SIGTERM, and the exit code."""
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout_s)


def eventually(what: str, check: Callable[[], Any], *, timeout_s: float = 60.0) -> Any:
    """Wait until `check()` is true; it may raise meanwhile. Returns what it gave."""
    until = time.monotonic() + timeout_s
    problem: object = "it never was true"
    while time.monotonic() < until:
        try:
            if value := check():
                return value
        except Exception as error:
            problem = error
        time.sleep(0.05)
    raise AssertionError(f"waited {timeout_s:.0f} s for: {what} ({problem})")
