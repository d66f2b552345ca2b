"""A federation as `fedmoe init` makes it: a real server with TLS and users, and each party's enrolment."""

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from click.testing import CliRunner, Result

from fedmoe.cli.main import cli
from fedmoe.errors import RedisUnavailableError
from fedmoe.protocol.parties import Party
from fedmoe.redis_settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.tools.deploy.deployment import Deployment
from tests.ports import free_port
from tests.processes import eventually

EXPERT, NAME = "sql_expert", "w1"
W1 = Party(role="worker", expert=EXPERT, name=NAME)


def tls_program() -> str:
    """A server program with TLS on this machine, "" if there is none: the wheel's Valkey is built without it."""
    for program in filter(None, map(shutil.which, ("redis-server", "valkey-server"))):
        without = [program, "--port", "0", "--tls-port", "1"]  # no certificate: it ends, and says why
        said = subprocess.run(without, capture_output=True, text=True, check=False).stdout
        if "Failed finding TLS support" not in said:
            return program
    return ""


def tls_server() -> str:
    """The same; skips the test if there is none."""
    return tls_program() or pytest.skip("no server with TLS on this machine: install redis-server")


class Secured:
    """A server from a deployment directory; use as a context manager.

    Args:
        directory: of the deployment; it is written unless it is there.
        workers: whom to enrol at once.
        host: in the URL of the enrolments.
        options: of the server, after its configuration.
        port: of loopback; 0 for a free one.
        answers: enrolment file of the party that asks whether it answers; None for the monitor's.
    """

    def __init__(
        self,
        directory: Path,
        *,
        workers: Sequence[Party] = (W1,),
        host: str = "localhost",
        options: Sequence[str] = (),
        port: int = 0,
        answers: Path | None = None,
    ) -> None:
        self.directory, self.port = directory, port or free_port()
        self._asks_with = answers or self.file("monitor")
        self.program, self._options = tls_server(), options
        self._process: subprocess.Popen[bytes] | None = None
        if not directory.exists():
            Deployment(directory=directory, hosts=[host], port=self.port, workers=workers).write(now=0.0)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def start(self) -> None:
        """Start it, again too, and wait until it answers; it listens on loopback only."""
        self.start_anyhow()
        eventually(f"port {self.port} to answer", self.answers, timeout_s=20)

    def start_anyhow(self) -> None:
        """The same; until it listens, because its certificate may be wrong."""
        command = [self.program, str(self.directory / "redis.conf"), "--bind", "127.0.0.1", "--tls-port",
                   str(self.port), "--dir", str(self.directory), *self._options]  # fmt: skip
        log = (self.directory / "log").open("ab")
        self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        log.close()
        eventually(f"port {self.port}", self._listens, timeout_s=20)

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.directory / "log").read_text()
        with socket.create_connection(("127.0.0.1", self.port)):
            return True

    def answers(self) -> bool:
        """True if the server answers a party."""
        connection = Connection(RedisSettings(enrolment=self._asks_with, timeout_s=5.0))
        try:
            with connection.errors():
                connection.client.execute_command("INFO")
        except (RedisUnavailableError, OSError):
            return False
        return True

    def kill(self) -> None:
        """Kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def file(self, name: str) -> Path:
        """A party's enrolment file."""
        return self.directory / "enrolments" / f"{name}.toml"

    def settings(self, name: str) -> RedisSettings:
        """The settings of the party with this enrolment file."""
        return RedisSettings(enrolment=self.file(name), timeout_s=5.0)

    def connection(self, name: str) -> Connection:
        """A connection of the party with this enrolment file."""
        return Connection(self.settings(name))

    def fedmoe(self, name: str, *words: str) -> Result:
        """Run a command with a party's enrolment file; an error is raised as it is."""
        options = ["--enrolment", os.fspath(self.file(name))]
        return CliRunner().invoke(cli, [*words, *options], catch_exceptions=False)
