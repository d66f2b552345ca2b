"""Starts, watches and always ends the demo's child processes."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from fedmoe.errors import FedMoEError

_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """In the child: ask Linux to kill this process when the demo dies, even by kill -9; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class Child:
    """One `fedmoe` process.

    Args:
        name: name for people. log: file with its output.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    started: float
    seconds: float = 0.0
    peak_mib: float = 0.0

    def sample(self) -> None:
        """Record run time and peak memory while the process runs."""
        if self.process.poll() is not None:
            return
        self.seconds = time.monotonic() - self.started
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return
        peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
        self.peak_mib = int(peaks[0]) / 1024 if peaks else self.peak_mib

    def tail(self, lines: int = 15) -> str:
        """The last lines of its log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.strip().splitlines()[-lines:])


@dataclass
class Children:
    """All child processes of a demo.

    Args:
        log_dir: directory of their logs. threads: number of threads of each, so that they share the machine.
    """

    log_dir: Path
    threads: int = 1
    all: list[Child] = field(default_factory=list)

    def start(self, name: str, *arguments: str, threads: int = 0) -> Child:
        """Start `fedmoe …` in the background."""
        log = self.log_dir / f"{name}.log"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FEDMOE_")}
        environment |= {"OMP_NUM_THREADS": str(threads or self.threads), "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as out:
            # In its own session, so that Ctrl-C reaches only the demo, which then ends its children in order.
            process = subprocess.Popen(
                [sys.executable, "-m", "fedmoe.cli.main", *arguments],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True, preexec_fn=_die_with_parent,  # noqa: PLW1509  # the demo has one thread
            )  # fmt: skip
        child = Child(name, process, log, time.monotonic())
        self.all.append(child)
        return child

    def check(self) -> None:
        """Sample every child; raise FedMoEError with the end of its log if one has failed."""
        for child in self.all:
            child.sample()
            if child.process.poll() not in (None, 0):
                raise FedMoEError(
                    f"{child.name} ended with exit code {child.process.returncode}:\n{child.tail()}",
                    about=child.name,
                )

    def finish(self, children: list[Child], *, timeout_s: float) -> None:
        """Send SIGTERM and wait for the exit of `children`; raise FedMoEError if one does not end or fails."""
        for child in children:
            child.sample()
            if child.process.poll() is None:
                child.process.terminate()
        until = time.monotonic() + timeout_s
        while any(child.process.poll() is None for child in children):
            for child in children:
                child.sample()
            if time.monotonic() > until:
                raise FedMoEError(
                    f"{children[0].name} did not end within {timeout_s:.0f} s", about=children[0].name
                )
            time.sleep(0.1)
        self.check()

    def kill(self) -> None:
        """Kill every child that still runs."""
        for child in self.all:
            if child.process.poll() is None:
                child.process.kill()
        for child in self.all:
            child.process.wait()
