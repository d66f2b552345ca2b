"""Real processes as a service manager sees them: health, signals as PID 1, levels in the journal."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import environment, eventually, fedmoe_here, running, terminate

pytestmark = pytest.mark.one_server

NOWHERE = "redis://127.0.0.1:1/0"


def test_a_process_whose_redis_is_away_is_alive(tmp_path: Path) -> None:
    """A restart would not bring Redis back. Once it was told to end, it is not alive any more.

    What it says about it has its level, if it says it to the journal.
    """
    file, log = tmp_path / "alive", tmp_path / "log"
    check = ("healthy", "--alive-file", str(file))
    assert fedmoe_here(*check).returncode == 1
    log.touch()
    words = ("aggregator", "run", "--redis", NOWHERE, "--alive-file", str(file))
    with running(log, *words, JOURNAL_STREAM=stream(log)) as process:
        eventually("it tries again", lambda: "127.0.0.1:1" in log.read_text())
        said = fedmoe_here(*check)
        assert (said.returncode, said.stdout.count("\n")) == (0, 1)
        assert f"aggregator (pid {process.pid})" in said.stdout
        assert terminate(process) == 0
    gone = fedmoe_here(*check)
    assert (gone.returncode, gone.stderr.count("\n")) == (1, 1)
    warning, stopping = (
        next(line for line in log.read_text().splitlines() if text in line)
        for text in ("127.0.0.1:1", "SIGTERM")
    )
    assert (warning[:3], stopping[:3]) == ("<4>", "<6>")


def stream(file: Path) -> str:
    """What systemd would call the journal, if it were this file."""
    found = file.stat()
    return f"{found.st_dev}:{found.st_ino}"


def test_an_error_in_the_journal_has_its_level(tmp_path: Path) -> None:
    """The sentence with which a command ends; `journalctl -p err` shows it."""
    log = tmp_path / "log"
    log.touch()
    with running(
        log, "healthy", "--alive-file", str(tmp_path / "none"), JOURNAL_STREAM=stream(log)
    ) as process:
        assert process.wait(60) == 1
    assert log.read_text().startswith("<3>fedmoe: there is no ")
    assert log.read_text().count("\n") == 1


def as_first_process() -> list[str]:
    """The words that make a command PID 1 of a new namespace, as in a container; skips where that is not permitted."""
    words = ["unshare", "--fork", "--pid", "--kill-child"]
    if not shutil.which("unshare"):
        pytest.skip("there is no program unshare here")
    tried = subprocess.run([*words, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"a PID namespace cannot be made here ({tried.stderr.strip()})")
    return words


@pytest.mark.parametrize("role", ["aggregator", "worker"])
def test_as_first_process_of_a_container_it_ends_at_sigterm(tmp_path: Path, role: str) -> None:
    """The kernel delivers to PID 1 only signals that it handles; without a handler it would be killed much later."""
    data, alive, log = tmp_path / "rows.jsonl", tmp_path / "alive", tmp_path / "log"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    options = ["--stream", "sql_expert", "--data", str(data)] if role == "worker" else []
    command = [sys.executable, "-m", "fedmoe.cli.main", role, "run", "--redis", NOWHERE, *options]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*as_first_process(), *command],
            env=environment(FEDMOE_ALIVE_FILE=str(alive)), stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        eventually("it has begun", alive.exists)
        (first,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert alive.read_text().split()[:2] == [role, "1"]
        os.kill(int(first), signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert "SIGTERM: stopping" in log.read_text()
