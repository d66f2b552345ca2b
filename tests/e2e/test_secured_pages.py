"""README's three machines and docs/secure.md, typed as they stand: over TLS, with users, as real processes."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from fedmoe.redis_settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from tests.documents import SECURED
from tests.ports import free_port
from tests.processes import environment, eventually, fedmoe_here
from tests.secured import tls_server

ON_AND_ON = {"redis-server": "Redis", "aggregator": "the expert", "worker run": "an update"}


class Machine:
    """A directory in which commands are typed; what runs on and on is ended with it."""

    def __init__(self, directory: Path, base_model: Path) -> None:
        self.directory, self.port = directory, free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        (directory / "bin").mkdir(parents=True)
        program = directory / "bin" / "redis-server"
        program.write_text(f'#!/bin/sh\nexec {tls_server()} "$@" --bind 127.0.0.1\n')
        program.chmod(0o755)
        (directory / "private.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 60)
        settings = {"BASE_MODEL": str(base_model), "RANK": "2", "SYNC_INTERVAL": "0.5"}
        path = f"{directory / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = environment(
            PATH=path, HOME=str(directory), **{f"FEDMOE_AGGREGATOR_RUN_{k}": v for k, v in settings.items()}
        )

    def type(self, text: str) -> str:
        """Type a command; what it prints, for one that ends."""
        text = text.replace("--host the-redis", f"--host localhost --port {self.port}")
        if text.startswith("export "):
            name, _, value = text.removeprefix("export ").partition("=")
            self.environment[name] = value
            return ""
        background = next((word for word in ON_AND_ON if word in text and " enrol " not in text), "")
        if not background or "init" in text:
            done = self._run(text)
            assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
            return done.stdout
        log = self.directory / f"{len(self._processes)}.log"
        with log.open("wb") as out:
            self._processes.append(
                subprocess.Popen(
                    ["bash", "-c", text], cwd=self.directory, env=self.environment, stdout=out, stderr=out,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                )
            )  # fmt: skip
        try:
            eventually(ON_AND_ON[background], lambda: self._is_ready(background), timeout_s=100)
        except AssertionError as error:
            raise AssertionError(f"{text}\n{error}\n{log.read_text()}") from error
        return ""

    def _run(self, text: str) -> subprocess.CompletedProcess[str]:
        words = shlex.split(text)
        if words[0] == "fedmoe":  # in this process, which has imported all
            config = self.environment.get("FEDMOE_CONFIG")
            return fedmoe_here(*(["--config", config] if config else []), *words[1:])
        return subprocess.run(words, cwd=self.directory, capture_output=True, text=True, check=False)

    def _is_ready(self, word: str) -> bool:
        file = self.directory / "federation" / "enrolments" / "operator.toml"
        store = GatewayStore(Connection(RedisSettings(enrolment=file)))
        with store.connection.errors():
            store.connection.client.info("server")
        if word == "aggregator":
            return bool(store.meta("sql_expert").commit)
        return word == "redis-server" or store.meta("sql_expert").applied > 0

    def end(self) -> None:
        """Kill what still runs."""
        for process in reversed(self._processes):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.one_server
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_commands_of_the_secured_pages_run(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From nothing to a worker that trains, in four commands; and no secret is in any output."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl, with which a site makes its request")
    machine = Machine(tmp_path / "here", tiny_model_dir)
    monkeypatch.chdir(machine.directory)
    began, printed = time.monotonic(), []
    try:
        for text in SECURED:
            printed.append(machine.type(text))
            if text.startswith("fedmoe init federation --host"):
                shutil.copy(machine.directory / "federation/enrolments/sql-1.toml", machine.directory)
            if text.startswith("fedmoe worker run"):
                print(f"from nothing to a training worker: {time.monotonic() - began:.1f} s")
        printed += [path.read_text() for path in machine.directory.glob("*.log")]
    finally:
        machine.end()
    files = [*machine.directory.glob("*.toml"), *(machine.directory / "federation/enrolments").iterdir()]
    secrets = [str(tomllib.loads(file.read_text())["password"]) for file in files]
    assert len(secrets) >= 6
    assert [secret for secret in secrets if any(secret in text for text in printed)] == []
