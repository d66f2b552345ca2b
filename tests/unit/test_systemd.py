"""The units in ops/systemd: systemd reads them without a warning, and finds them closed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT, misfit
from tests.services import LONGEST_STOP_S, UNITS, read

SERVICES = (
    "fedmoe-aggregator.service", "fedmoe-worker@sql-1.service", "fedmoe-backup.service",
    "fedmoe-dashboard.service", "fedmoe-redis.service",
)  # fmt: skip
REDIS = UNITS / "fedmoe-redis.service"
EXPOSURE = 20  # tenths of systemd's scale from 0 (closed) to 10


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units with a program that is there."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze here: apt-get install systemd")
    for path in UNITS.glob("fedmoe*"):
        name = path.name.replace("@.", "@sql-1.")
        text = re.sub(r"(?<=^ExecStart=)\S+", sys.executable, path.read_text(), flags=re.MULTILINE)
        (tmp_path / name).write_text(text)
    return tmp_path


def analyze(units: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *words], cwd=units, capture_output=True, text=True, timeout=60)


def test_systemd_finds_no_mistake(units: Path) -> None:
    """Not one warning, about the timer neither."""
    done = analyze(units, "verify", *(f"./{name}" for name in (*SERVICES, "fedmoe-backup.timer")))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", SERVICES)
def test_units_are_closed(units: Path, name: str) -> None:
    """The verdict of `systemd-analyze security`; it fails above the threshold."""
    done = analyze(units, "security", "--no-pager", "--offline=true", f"--threshold={EXPOSURE}", f"./{name}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted({*UNITS.glob("*.service")} - {REDIS}), ids=lambda path: path.name)
def test_their_commands_exist(path: Path) -> None:
    """As an operator would type them."""
    command = read(path.name)["ExecStart"]
    assert misfit(command.replace("/opt/fedmoe/bin/", "").replace("%S", "/var/lib")) == ""


def test_redis_keeps_what_it_writes_to_itself() -> None:
    """ACL SAVE writes the hashes of all passwords again, with the mode that the umask allows."""
    unit = read(REDIS.name)
    assert (unit["UMask"], unit["StateDirectoryMode"]) == ("0077", "0700")
    assert unit["ExecStart"].endswith("%S/fedmoe-redis/redis.conf")


def test_a_stop_may_take_as_long_as_it_takes() -> None:
    """A worker that is killed before its last checkpoint is written loses what it trained since the one before."""
    assert LONGEST_STOP_S < int(read("fedmoe-worker@.service")["TimeoutStopSec"]) < LONGEST_STOP_S + 15
    assert int(read("fedmoe-aggregator.service")["TimeoutStopSec"]) >= 2 * (2.0 + 1.5)


def test_variables_in_the_units_are_those_of_the_commands() -> None:
    """A misspelled one would be ignored."""
    page = (ROOT / "docs" / "settings.md").read_text()
    for path in UNITS.glob("*.service"):
        for name in re.findall(r"\bFEDMOE_(?!ENROLMENT\b|ALIVE_FILE\b)(\w+)=", path.read_text()):
            option = name.removeprefix("WORKER_RUN_").replace("_", "-").lower()
            assert name.startswith("WORKER_RUN_"), name
            assert f"`--{option} " in page.partition("## `fedmoe worker run`")[2], name
