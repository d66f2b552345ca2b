"""Real processes that are watched: one that ends by itself ends the benchmark, and none outlives it."""

import ctypes
import itertools
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
import torch

from fedmoe.errors import RedisUnavailableError
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.tools.deploy.certificates import make_authority, make_server
from fedmoe.util.memory import keep_freed

# Children are forked off a process that has imported torch and done nothing else: no second of imports for each.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ops.bench.fedmoe_side", "ops.bench.raw_side", "ops.bench.http_side"])
_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
_FILE_SETTINGS = (
    "auto-aof-rewrite-min-size",
    "auto-aof-rewrite-percentage",
    "aof-use-rdb-preamble",
    "rdbcompression",
)
_CPUCLOCK_SCHED = 2  # from Linux' posix-timers.h
READY_TIMEOUT_S = 90.0
ROOT = Path(__file__).parents[2]
# Below the range from which Linux takes the ports of clients (32768 to 60999): what is free stays free. From a random
# one on, so that two benchmarks at once seldom meet.
PORTS, _FIRST = 10_000, 10_000
_BEGIN = random.SystemRandom().randrange(PORTS)
_PORTS = itertools.cycle(_FIRST + (_BEGIN + number) % PORTS for number in range(PORTS))


class BenchError(Exception):
    """The benchmark cannot go on; the message is one sentence for a person."""


@dataclass(frozen=True, slots=True)
class Watched:
    """One process of a contestant, and how to end it."""

    role: str
    pid: int
    exit_code: Callable[[], int | None]
    kill: Callable[[], object]
    log: Path
    may_end: bool = False  # with exit code 0


@dataclass
class Processes:
    """The processes of one contestant, by role; several of one role (clients) count together. A context manager."""

    name: str
    started: list[Watched] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="fedmoe-bench-")
        self.directory = Path(self._temporary.name)  # gone at the end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in reversed(self.started):
            process.kill()
        self.started.clear()
        self._temporary.cleanup()

    def _log(self, role: str) -> Path:
        return self.directory / f"{len(self.started)}-{role}.log"

    def call(self, role: str, target: Callable[..., object], *arguments: Any) -> None:
        """Run `target(*arguments)` in a process of its own; it must not return before it is killed."""
        log = self._log(role)
        process = CONTEXT.Process(target=_child, args=(log, target, *arguments), daemon=True)
        process.start()
        assert process.pid is not None

        def kill() -> None:
            process.kill()
            process.join()

        self.started.append(Watched(role, process.pid, lambda: process.exitcode, kill, log))

    def command(self, role: str, *arguments: str, may_end: bool = False, **environment: str) -> None:
        """Run a command in a session of its own; only with `may_end` it may end before it is killed."""
        log = self._log(role)
        with log.open("wb") as out:
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT,
                start_new_session=True, env=clean_environment() | environment,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  # nothing of it takes a lock
            )  # fmt: skip

        def kill() -> None:
            if process.poll() is None:
                started = psutil.Process(process.pid).children(
                    recursive=True
                )  # Flower's make sessions of their own
                os.killpg(process.pid, signal.SIGKILL)
                for child in started:
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
            process.wait()

        self.started.append(Watched(role, process.pid, process.poll, kill, log, may_end))

    def has_ended(self, role: str) -> bool:
        """True if all processes of a role have ended well."""
        return all(process.exit_code() == 0 for process in self.started if process.role == role)

    def redis(self, *, aof: bool = False, tls: bool = False, options: Sequence[str] = ()) -> str:
        """Start a private server on loopback TCP and return its URL.

        Args:
            aof: with the append-only file, and the settings for it that ops/redis.conf recommends.
            tls: over TLS, with a certificate that clients check.
            options: further server options.

        Raises:
            BenchError: if the server has no TLS.
        """
        port = free_port()
        url, listen = f"redis://127.0.0.1:{port}/0", ["--port", str(port)]
        if tls:
            url, listen = self._tls(port)
        listen += [
            "--bind",
            "127.0.0.1",
            "--appendonly",
            "yes" if aof else "no",
            *(file_settings() if aof else ()),
        ]
        server = EmbeddedRedis(options=[*listen, *options])
        try:
            server.start()
        except RedisUnavailableError as error:
            server.stop()
            if tls:
                raise BenchError(f"{server.server} did not start with TLS: is it built with it?") from error
            raise
        except BaseException:
            server.stop()
            raise
        process = server.process
        assert process is not None
        log = server.directory / "redis.log"
        self.started.append(Watched("redis", process.pid, process.poll, server.stop, log))
        return url

    def _tls(self, port: int) -> tuple[str, list[str]]:
        """The URL of a server over TLS, and its options."""
        authority = make_authority("bench")
        pair = make_server(authority, ["127.0.0.1"])
        files = {
            "tls-ca-cert-file": authority.certificate,
            "tls-cert-file": pair.certificate,
            "tls-key-file": pair.key,
        }
        options = ["--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no"]
        for name, text in files.items():
            (self.directory / name).write_text(text)
            options += [f"--{name}", str(self.directory / name)]
        return f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={self.directory / 'tls-ca-cert-file'}", options

    def check(self) -> None:
        """Raise BenchError if a process has ended."""
        for process in self.started:
            code = process.exit_code()
            if code is not None and not (code == 0 and process.may_end):
                words = process.log.read_text(errors="replace").split("\n") if process.log.exists() else []
                last = next((line.strip() for line in reversed(words) if line.strip()), "it said nothing")
                raise BenchError(f"{self.name}: the {process.role} process ended with code {code}: {last}")

    def sleep(self, seconds: float) -> None:
        """Wait, watching."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.check()
            time.sleep(min(0.05, left))
        self.check()

    def until(self, what: str, condition: Callable[[], bool], *, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until `condition()`, watching.

        Raises:
            BenchError: if that takes too long.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                raise BenchError(f"{self.name}: waited {timeout_s:.0f} s for {what}")
            time.sleep(0.01)

    @property
    def pids(self) -> list[int]:
        """Of all processes."""
        return [process.pid for process in self.started]

    def _by_role(self, measure: Callable[[int], float]) -> dict[str, float]:
        self.check()
        total: dict[str, float] = {}
        for process in self.started:
            try:
                total[process.role] = total.get(process.role, 0.0) + measure(process.pid)
            except (psutil.Error, OSError):
                self.check()  # it ended between two looks
                raise
        return total

    def cpu_s(self) -> dict[str, float]:
        """CPU-seconds (user and system) used so far, by role."""
        return self._by_role(cpu_s)

    def pages(self) -> dict[str, float]:
        """Pages of memory that the kernel has given the processes so far (minor faults), by role."""
        return self._by_role(_pages)

    def rss_mib(self) -> dict[str, float]:
        """Resident memory in MiB now, by role."""
        return self._by_role(lambda pid: psutil.Process(pid).memory_info().rss / 2**20)

    def peak_rss_mib(self) -> dict[str, float]:
        """The most resident memory in MiB that the processes had, by role."""
        return self._by_role(_peak_rss_mib)


def file_settings() -> list[str]:
    """Options for the append-only file, from ops/redis.conf."""
    lines = (ROOT / "ops" / "redis.conf").read_text().splitlines()
    settings = [line.split() for line in lines if line.partition(" ")[0] in _FILE_SETTINGS]
    return [word for name, value in settings for word in (f"--{name}", value)]


def cpu_s(pid: int) -> float:
    """CPU seconds of a process, to the nanosecond (psutil counts ticks of 10 ms).

    The clock is the one that clock_getcpuclockid(3) names.
    """
    return time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)


def _pages(pid: int) -> float:
    """The tenth field of /proc/PID/stat; the second one, the program's name in brackets, may hold spaces."""
    return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def _peak_rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise BenchError(f"process {pid} has no VmHWM in /proc: the benchmarks need Linux")


def clean_environment() -> dict[str, str]:
    """The environment without the settings of the person who runs this."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FEDMOE_") or k == "FEDMOE_REDIS_SERVER"}
    return kept | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def finish(what: str, command: Sequence[str]) -> None:
    """Run a command that installs something, to its end.

    Args:
        what: it installs, for the message.
        command: its words.

    Raises:
        BenchError: with what it said last.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise BenchError(f"{what} could not be installed: {last}")


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on; each call gives another one."""
    for port in itertools.islice(_PORTS, PORTS):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise BenchError(f"none of {PORTS} ports is free")


def _die_with_parent() -> None:
    """The system kills this process when the one that started it is gone, however it went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _child(log: Path, target: Callable[..., object], *arguments: Any) -> None:
    """Body of a forked process: ends with the benchmark, leaves Ctrl-C to it, and one thread of torch has to do."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        # Not by prctl: the fork server started this process, and lives as long as any that it started.
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_freed(blocks_mib=32, free_mib=64)  # as `fedmoe worker run`, for all contestants alike
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    try:
        target(*arguments)
    except BaseException as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        os._exit(1)
