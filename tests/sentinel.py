"""A master, one replica and Sentinel on loopback, as real processes that can be stopped, killed and started again."""

import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.ports import free_port
from tests.processes import eventually

MASTER = "federation"
DOWN_AFTER_MS = 1000
# Sentinel's clockwork, quicker than usual. It promotes no replica that it has not heard of for five ping periods, and
# while the master is down it asks a replica only once a second.
PERIODS_MS = {"info-period": 300, "ping-period": 300, "ask-period": 100, "publish-period": 200}


class Process:
    """One server or sentinel on a port of its own; its directory outlives it."""

    def __init__(
        self,
        program: str,
        directory: Path,
        config: Sequence[str],
        *,
        sentinel: bool = False,
        certificate: Path | None = None,
        checks_host: bool = True,
    ) -> None:
        self.port = free_port()
        self.directory = directory
        directory.mkdir()
        self._config = directory / "server.conf"  # Sentinel, and CONFIG REWRITE, write to it
        lines = ["bind 127.0.0.1", f"dir {directory}", f"logfile {directory}/log", *config]
        if certificate:
            lines += ["port 0", f"tls-port {self.port}", "tls-replication yes", "tls-auth-clients no"]
            lines += [f"tls-{what}-file {certificate}" for what in ("cert", "key", "ca-cert")]
        else:
            lines += [f"port {self.port}"]
        self._config.write_text("\n".join(lines) + "\n")
        self._command = [program, str(self._config), *(["--sentinel"] if sentinel else [])]
        self._process: subprocess.Popen[bytes] | None = None
        self.client: Any = redis.Redis(
            "127.0.0.1", self.port, socket_timeout=5.0, retry=Retry(NoBackoff(), 0),
            ssl=certificate is not None, ssl_ca_certs=str(certificate), ssl_check_hostname=checks_host,
        )  # fmt: skip

    def start(self) -> None:
        """Start it, again too, and wait until it answers."""
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        eventually(f"port {self.port} to answer", self.client.ping, timeout_s=10)
        assert self.client.info("server")["process_id"] == self._process.pid, "another server has this port"

    def configure(self, lines: str) -> None:
        """Add lines to its configuration, which it reads at its next start."""
        self._config.write_text(self._config.read_text() + lines)

    def is_running(self) -> bool:
        """True unless it was killed, or ended by itself."""
        return self._process is not None and self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill -9, stopped or not; harmless if it is dead or never ran."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self.client.close()


class Replicated:
    """Two servers and some sentinels; use as a context manager. `first` is the master until it is killed.

    Args:
        program: redis-server or valkey-server.
        directory: empty; everything is written there.
        sentinels: how many; a majority of them must agree.
        certificate: a file with a key and a certificate for 127.0.0.1 that is its own CA; then all is TLS.
        checks_host: the certificate is for 127.0.0.1.
    """

    def __init__(
        self, program: str, directory: Path, *, sentinels: int = 1, certificate: Path | None = None,
        checks_host: bool = True,
    ) -> None:  # fmt: skip
        directory.mkdir(exist_ok=True)
        tls = {"certificate": certificate, "checks_host": checks_host}
        # With an append-only file a killed master comes back with all that it had acknowledged, as real ones do.
        options = ["save ''", "appendonly yes", "appendfsync no", "repl-diskless-sync-delay 0"]
        options += ["repl-ping-replica-period 1"]
        self.first = Process(program, directory / "first", options, **tls)
        replicates = [*options, f"replicaof 127.0.0.1 {self.first.port}"]
        self.second = Process(program, directory / "second", replicates, **tls)
        watch = [
            f"sentinel monitor {MASTER} 127.0.0.1 {self.first.port} {sentinels // 2 + 1}",
            f"sentinel down-after-milliseconds {MASTER} {DOWN_AFTER_MS}",
            f"sentinel failover-timeout {MASTER} 1000",
        ]
        self.sentinels = [
            Process(program, directory / f"sentinel{number}", watch, sentinel=True, **tls)
            for number in range(sentinels)
        ]
        self.hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        self.url = f"sentinel://{self.hosts}/{MASTER}"

    def __enter__(self) -> Self:
        try:
            for server in (self.first, self.second):
                server.start()
            eventually("the replica to be in step", self._in_step, timeout_s=10)
            for sentinel in self.sentinels:
                sentinel.start()
                for name, value in PERIODS_MS.items():
                    sentinel.client.execute_command("SENTINEL", "DEBUG", name, value)
            for sentinel in self.sentinels:
                eventually("Sentinel to know all", lambda s=sentinel: self._ready(s), timeout_s=20)
        except BaseException:
            self.stop()
            raise
        return self

    def _in_step(self) -> bool:
        # The replica says "up" a moment before the master sends it what is written.
        replica = self.first.client.info("replication").get("slave0", {})
        return bool(replica.get("state") == "online") and self._linked(self.second)

    @staticmethod
    def _linked(server: Process) -> bool:
        return bool(server.client.info("replication").get("master_link_status") == "up")

    def _ready(self, sentinel: Process) -> bool:
        state = sentinel.client.sentinel_masters()[MASTER]
        replicas = sentinel.client.sentinel_slaves(MASTER)
        return state["num-other-sentinels"] == len(self.sentinels) - 1 and [
            replica.get("master-link-status") for replica in replicas
        ] == ["ok"]

    def hold_replication(self) -> None:
        """From now on nothing reaches the replica: it sleeps, and its link, with what the kernel buffers, is cut."""
        self.second.signal(signal.SIGSTOP)
        self.first.client.execute_command("CLIENT KILL TYPE replica")

    def fail_over(self) -> None:
        """Kill the master and wake the replica, which Sentinel will promote."""
        self.first.kill()
        self.second.signal(signal.SIGCONT)

    def is_master(self, server: Process) -> bool:
        """True if this server says that it is the master, and so do all sentinels."""
        address = ("127.0.0.1", server.port)
        told = [sentinel.client.sentinel_masters()[MASTER] for sentinel in self.sentinels]
        return server.client.role()[0] == b"master" and all((t["ip"], t["port"]) == address for t in told)

    def is_replica(self, server: Process) -> bool:
        """True if this server follows the master."""
        return bool(server.client.role()[0] == b"slave") and self._linked(server)

    def stop(self) -> None:
        """Kill everything that runs."""
        for process in (*self.sentinels, self.first, self.second):
            with suppress(ProcessLookupError):
                process.kill()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
