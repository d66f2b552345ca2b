"""Three sites as the README draws them: TLS and users, each machine with a network of its own, and what befalls them.

Machine 1 has Redis, the aggregator and the worker of docs_expert, machine 2 that of python_expert, machine 3 that of
sql_expert. All of it is typed as an operator types it: `fedmoe init`, then the scripts of ops/.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_training import write_rows
from tests.machines import Machine, machines, why_not
from tests.processes import eventually
from tests.secured import tls_server

ROOT = Path(__file__).parents[2]
FEDMOE = Path(sys.executable).parent / "fedmoe"
LEASE_S = 1
WORKERS = ("docs_expert/docs-1", "python_expert/python-1", "sql_expert/sql-1")
EXPERTS = tuple(worker.partition("/")[0] for worker in WORKERS)

pytestmark = [pytest.mark.one_server, pytest.mark.slow]


class Site:
    """What is typed on one machine."""

    def __init__(self, machine: Machine, model: Path) -> None:
        self.machine = machine
        self._model = model

    def script(self, name: str, *arguments: str) -> str:
        """A script of ops/ with the machine's own run directory; it must succeed."""
        done = self.machine.run(
            "bash", str(ROOT / "ops" / name), *arguments,
            FEDMOE_RUN_DIR=str(self.machine.home / "run"), FEDMOE_BIN=str(FEDMOE),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def fedmoe(self, *arguments: str) -> str:
        """A command that ends well."""
        done = self.machine.run(str(FEDMOE), *arguments)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}{done.stderr}"
        return done.stdout

    def start_redis(self) -> None:
        """As `fedmoe init` says; it is there when `doctor` finds nothing wrong."""
        self.machine.start("redis.log", tls_server(), "federation/redis.conf")
        eventually(
            "Redis",
            lambda: (
                self.machine.run(
                    str(FEDMOE),
                    "doctor",
                    "--enrolment",
                    "federation/enrolments/operator.toml",
                    "--role",
                    "operator",
                ).returncode
                == 0
            ),
            timeout_s=60,
        )

    def start_aggregator(self) -> None:
        """With the enrolment of the deployment."""
        experts = [word for name in EXPERTS for word in ("--expert", name)]
        self.script(
            "start_aggregator.sh", "--enrolment", "federation/enrolments/aggregator.toml", *experts,
            "--base-model", str(self._model), "--rank", "4", "--sync-interval", "0.5", "--learning-rate", "0.003",
            "--lease", str(LEASE_S), "--keep-updates", "kept",
        )  # fmt: skip

    def start_worker(self, name: str) -> None:
        """With the enrolment file that came to this machine."""
        write_rows(self.machine.home / "rows.jsonl", name, "red blue")
        self.script(
            "start_worker.sh", "--enrolment", f"{name}.toml", "--data", "rows.jsonl", "--name", name,
            "--state-dir", f"state-{name}", "--log-interval", "0.5", "--checkpoint-interval", "1",
        )  # fmt: skip

    def watch(self) -> None:
        """The monitor looks twice a second; each look is a line."""
        self.machine.start(
            "watch.log", str(FEDMOE), "status", "--watch", "0.5", "--json",
            "--enrolment", "federation/enrolments/monitor.toml",
        )  # fmt: skip

    def expert(self, name: str) -> dict[str, Any]:
        """What the monitor last saw of an expert."""
        lines = (self.machine.home / "watch.log").read_text().split("\n")
        seen = json.loads(next(line for line in reversed(lines[:-1]) if line.startswith("{")))
        return next(one for one in seen["experts"] if one["name"] == name)

    def version(self, name: str) -> int:
        """Of an expert."""
        return int((self.expert(name)["meta"] or {"version": 0})["version"])

    def log(self, daemon: str) -> str:
        """What a daemon wrote."""
        return next((self.machine.home / "run").glob(f"{daemon}*.log")).read_text()


def hand_over(file: Path, to: Machine) -> None:
    """Bring an enrolment file to its machine; only its owner may read it there, too."""
    shutil.copy(file, to.home / file.name)
    (to.home / file.name).chmod(0o600)


@pytest.fixture
def sites(tmp_path: Path, tiny_model_dir: Path) -> Iterator[list[Site]]:
    if reason := why_not():
        pytest.skip(reason)
    with machines(tmp_path, 4) as made:
        yield [Site(machine, tiny_model_dir) for machine in made]


@pytest.mark.timeout(600)
def test_what_befalls_three_machines(sites: list[Site]) -> None:
    """It trains; a link goes down and comes back; a worker is revoked; machine 1 reboots; a fourth machine joins.

    The revoked worker trains on, since its operator may only have changed the password, and says what is wrong.
    """
    one, two, three, four = sites
    told = [word for worker in WORKERS for word in ("--worker", worker)]
    one.fedmoe("init", "federation", "--host", one.machine.address, *told)
    files = one.machine.home / "federation" / "enrolments"
    for site, worker in zip((one, two, three), WORKERS, strict=True):
        hand_over(files / f"{worker.partition('/')[2]}.toml", site.machine)
    one.start_redis()
    one.start_aggregator()
    one.watch()
    for site, worker in zip((one, two, three), WORKERS, strict=True):
        site.start_worker(worker.partition("/")[2])
    for name in EXPERTS:
        eventually(f"{name} to learn", lambda name=name: one.version(name) >= 2, timeout_s=120)

    # The link of machine 3 goes down for longer than the lease: its worker trains on, and loses nothing.
    three.machine.unplug()
    steps = last_step(three)
    eventually("machine 3 to train alone", lambda: last_step(three) >= steps + 20, timeout_s=60)
    still = one.version("sql_expert")
    others = one.version("python_expert")
    eventually("the others to go on", lambda: one.version("python_expert") > others, timeout_s=60)
    assert one.version("sql_expert") <= still + 1  # one may have been on its way
    three.machine.plug_in()
    eventually("machine 3 to be heard", lambda: one.version("sql_expert") > still + 1, timeout_s=120)

    # A worker is revoked while its update waits: the update is still decided, its process ends with a sentence.
    aggregator = next(pid for pid in one.machine.pids() if "aggregator" in command_of(pid))
    os.kill(aggregator, signal.SIGSTOP)
    eventually("an update to wait", lambda: one.expert("python_expert")["waiting"], timeout_s=60)
    one.fedmoe(
        "worker", "revoke", "python-1", "--stream", "python_expert",
        "--enrolment", "federation/enrolments/operator.toml",
    )  # fmt: skip
    before = one.version("python_expert")
    os.kill(aggregator, signal.SIGCONT)
    eventually("the update to be applied", lambda: one.version("python_expert") > before, timeout_s=60)
    eventually("the worker to say so", lambda: "this user was revoked" in two.log("worker"), timeout_s=60)
    two.script("stop_all.sh")
    assert "Traceback" not in two.log("worker")
    refused = two.machine.run(
        str(FEDMOE), "worker", "run", "--enrolment", "python-1.toml", "--data", "rows.jsonl", "--name", "python-1",
    )  # fmt: skip
    assert refused.returncode != 0
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr

    # Machine 1 reboots: Redis, aggregator and the worker of docs_expert die at once.
    one.machine.crash()
    (one.machine.home / "watch.log").unlink()
    one.start_redis()
    one.start_aggregator()
    one.watch()
    one.start_worker("docs-1")
    eventually("the monitor to see again", lambda: one.version(EXPERTS[0]), timeout_s=60)
    known = {name: one.version(name) for name in EXPERTS}
    for name in ("docs_expert", "sql_expert"):
        eventually(f"{name} to go on", lambda name=name: one.version(name) > known[name] + 2, timeout_s=120)

    # A fourth machine joins.
    one.fedmoe(
        "worker", "enrol", "sql-2", "--stream", "sql_expert", "--out", "sql-2.toml",
        "--enrolment", "federation/enrolments/operator.toml",
    )  # fmt: skip
    hand_over(one.machine.home / "sql-2.toml", four.machine)
    four.start_worker("sql-2")
    eventually(
        "the fourth machine's updates",
        lambda: (
            "sql-2"
            in {worker["name"] for worker in one.expert("sql_expert")["workers"] if worker["published"]}
        ),
        timeout_s=120,
    )

    for site in (three, four, one):
        site.script("stop_all.sh")
    said = one.fedmoe(
        "verify", "--keep-updates", "kept", "--enrolment", "federation/enrolments/operator.toml"
    )
    assert said.count(", equal") == len(EXPERTS), said
    for name in EXPERTS:
        assert one.expert(name)["meta"]["refused"] == 0
    assert "Traceback" not in one.log("aggregator") + one.log("worker") + three.log("worker") + four.log(
        "worker"
    )


def last_step(site: Site) -> int:
    """The last step in the log of a machine's worker."""
    lines = [line for line in site.log("worker").splitlines() if line.startswith("step ")]
    return int(lines[-1].split()[1]) if lines else 0


def command_of(pid: int) -> str:
    """A process's command line."""
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
