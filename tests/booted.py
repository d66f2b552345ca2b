"""A real systemd as PID 1 of namespaces of its own, for the units in ops/systemd.

It sees this machine's files, but what units write goes to directories in memory, and its network is a loopback of its
own. It knows only the units that it is given, so it starts and cleans nothing else.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.documents import ROOT
from tests.processes import eventually
from tests.services import UNITS

SYSTEMD = Path("/lib/systemd/systemd")
JOURNAL = ("systemd-journald.service", "systemd-journald.socket")
# Directories of the system that the units write to, or in which they look for fedmoe; in memory here.
IN_MEMORY = ("/run", "/opt", "/srv", "/var/lib", "/var/cache", "/mnt")
NAMESPACES = ("--fork", "--pid", "--mount", "--cgroup", "--ipc", "--uts", "--net", "--kill-child")


def why_not() -> str:
    """Why no systemd can be booted here; "" if it can."""
    if os.geteuid() != 0:
        return "only root can boot a systemd"
    if not SYSTEMD.exists() or not all(map(shutil.which, ("unshare", "nsenter"))):
        return "there is no systemd here (Debian: systemd, util-linux)"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True, timeout=20,
        check=False,
    )  # fmt: skip
    return f"namespaces are not permitted here ({tried.stderr.strip()})" if tried.returncode else ""


@dataclass(frozen=True, slots=True)
class Booted:
    """A running systemd; `pid` is its process as this machine knows it."""

    pid: int

    def run(self, *command: str, timeout_s: float = 100.0) -> subprocess.CompletedProcess[str]:
        """Run a command beside it, as root."""
        inside = ["nsenter", "-t", str(self.pid), "-m", "-p", "-n", "-i", "-u", *command]
        return subprocess.run(inside, capture_output=True, text=True, timeout=timeout_s, check=False, cwd="/")

    def ask(self, *command: str) -> str:
        """The same; what it prints. It must not fail."""
        done = self.run(*command)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, unit: str) -> dict[str, str]:
        """A unit's properties."""
        return dict(
            line.split("=", 1) for line in self.ask("systemctl", "show", unit).splitlines() if "=" in line
        )


@contextmanager
def booted(directory: Path, setup: str) -> Iterator[Booted]:
    """Boot a systemd that knows our units.

    Args:
        directory: for its unit files and what it prints.
        setup: shell commands that prepare the machine; they run as root in its namespaces, before systemd.
    """
    units = directory / "units"
    units.mkdir(parents=True)
    for name in JOURNAL:
        shutil.copy(SYSTEMD.parent / "system" / name, units)
    (units / "basic.target").write_text("[Unit]\nDefaultDependencies=no\nRequires=systemd-journald.socket\n")
    for name in ("sysinit", "shutdown", "network-online", "multi-user", "timers"):
        (units / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    for path in UNITS.glob("fedmoe*.service"):
        shutil.copy(path, units)
        more = units / f"{path.name}.d"
        more.mkdir()
        (more / "sooner.conf").write_text("[Service]\nRestartSec=1\n")
    script = directory / "boot.sh"
    script.write_text(_boot(units, setup))
    with (directory / "boot.log").open("wb") as log:
        process = subprocess.Popen(
            ["unshare", *NAMESPACES, "bash", str(script)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield _wait(process, directory / "boot.log")
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], log: Path) -> Booted:
    """Wait until systemd, the child of `unshare`, answers."""

    def boots() -> Booted | None:
        assert process.poll() is None, log.read_text()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        found = Booted(int(children[0]))
        is_systemd = Path(f"/proc/{found.pid}/comm").read_text() == "systemd\n"
        return (
            found
            if is_systemd and found.run("systemctl", "is-system-running").stdout == "running\n"
            else None
        )

    try:
        return eventually("systemd", boots, timeout_s=30)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.read_text()}") from error


def _boot(units: Path, setup: str) -> str:
    python = Path(sys.executable).resolve()
    base = python.parent.parent
    paths = [
        ROOT,
        *(Path(path) for path in sys.path if Path(path).is_dir() and base not in Path(path).parents),
    ]
    binds = {f"/opt/path{number}": path for number, path in enumerate(dict.fromkeys(paths))}
    from_here = {**binds, "/opt/python": base, "/run/units": units}
    memory = "\n".join(f"mount -t tmpfs -o mode=755 tmpfs {place}" for place in IN_MEMORY)
    opened = " ".join(
        f"{number}<{shlex.quote(str(path))}" for number, path in enumerate(from_here.values(), 10)
    )
    bound = "\n".join(
        f"mkdir -p {place} && mount --bind /proc/self/fd/{number} {place}"
        for number, place in enumerate(from_here, 10)
    )
    return f"""set -euo pipefail
mount --make-rprivate /
mount -t proc proc /proc
exec {opened}
{memory}
{bound}
exec {" ".join(f"{number}<&-" for number in range(10, 10 + len(from_here)))}
mkdir -p /opt/fedmoe/bin /mnt/etc /run/lock
cat >/opt/fedmoe/bin/fedmoe <<'END'
#!/bin/sh
export PYTHONPATH={":".join(binds)} PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
export LD_LIBRARY_PATH=/opt/python/lib
exec /opt/python/bin/{python.name} -m fedmoe.cli.main "$@"
END
chmod 755 /opt/fedmoe/bin/fedmoe
cp -a /etc/. /mnt/etc
mount --bind /mnt/etc /etc
rm -rf /etc/fedmoe && mkdir -m 755 /etc/fedmoe
systemd-sysusers {UNITS}/fedmoe.sysusers.conf
{setup}
export container=test SYSTEMD_UNIT_PATH=/run/units
exec {SYSTEMD} --system --unit=basic.target --log-target=console --show-status=no
"""
