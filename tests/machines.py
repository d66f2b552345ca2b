"""Machines for tests: a network namespace each, with one link to a switch that lies in a namespace of its own.

Nothing of it is reachable from outside, and nothing in it reaches the network of this machine.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.processes import environment


def why_not() -> str:
    """Why machines cannot be made here; "" if they can."""
    if not shutil.which("ip"):
        return "there is no program `ip` (Debian: iproute2)"
    name = f"fm{os.getpid()}x"
    made = subprocess.run(
        ["ip", "netns", "add", name], capture_output=True, text=True, check=False, timeout=20
    )
    if made.returncode:
        return f"network namespaces are not permitted here ({made.stderr.strip()})"
    try:
        tried = subprocess.run(
            ["ip", "-n", name, "link", "add", "sw", "type", "bridge"],
            capture_output=True, text=True, check=False, timeout=20,
        )  # fmt: skip
        return f"no switch can be made here ({tried.stderr.strip()})" if tried.returncode else ""
    finally:
        _ip("netns", "del", name)


@dataclass(slots=True)
class Machine:
    """A machine: an address, a home directory, and the processes that run on it.

    Args:
        namespace: its network namespace; switch: that of the switch, where its link ends in a port of the same name.
        home: what its users and daemons write to.
    """

    namespace: str
    switch: str
    address: str
    home: Path
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, *command: str, timeout_s: float = 100.0, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, in its home directory."""
        return subprocess.run(
            self._here(command), env=self._environment(**extra), cwd=self.home, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=timeout_s, check=False,
        )  # fmt: skip

    def start(self, log: str, *command: str, **extra: str) -> subprocess.Popen[bytes]:
        """A command in the background, its output in a file of its home directory."""
        with (self.home / log).open("ab") as out:
            process = subprocess.Popen(
                self._here(command), env=self._environment(**extra), cwd=self.home, stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._started.append(process)
        return process

    def unplug(self) -> None:
        """Cut the link: packets are lost, connections stay as they are."""
        _ip("-n", self.switch, "link", "set", self.namespace, "down")

    def plug_in(self) -> None:
        """Bring the link back."""
        _ip("-n", self.switch, "link", "set", self.namespace, "up")

    def pids(self) -> list[int]:
        """Of all processes on it."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def crash(self) -> None:
        """Kill every process at once, as a power cut does; its disk stays."""
        deadline = time.monotonic() + 30
        while pids := self.pids():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self._started:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
            assert time.monotonic() < deadline, f"processes that cannot be killed: {pids}"

    def _here(self, command: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *command]

    def _environment(self, **extra: str) -> dict[str, str]:
        return environment(HOME=str(self.home), **extra)


@contextmanager
def machines(root: Path, n: int) -> Iterator[list[Machine]]:
    """`n` machines on one switch, with the addresses 10.77.0.1, 10.77.0.2, …; their homes are directories of `root`."""
    switch = f"fm{os.getpid()}s"
    made: list[Machine] = []
    _ip("netns", "add", switch)
    try:
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for number in range(1, n + 1):
            name = f"fm{os.getpid()}m{number}"
            machine = Machine(name, switch, f"10.77.0.{number}", root / f"machine-{number}")
            machine.home.mkdir(parents=True)
            _ip("netns", "add", name)
            made.append(machine)
            _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", name, "netns", switch)
            _ip("-n", switch, "link", "set", name, "master", "switch", "up")
            _ip("-n", name, "address", "add", f"{machine.address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", name, "link", "set", link, "up")
        yield made
    finally:
        for machine in made:
            machine.crash()
            _ip("netns", "del", machine.namespace)
        _ip("netns", "del", switch)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=20)
    assert not done.returncode, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
    return done.stdout
