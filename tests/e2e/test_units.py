"""The units of ops/systemd under a real systemd, from what `fedmoe init` writes: they run, end, and start again."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmoe.protocol.parties import Party
from fedmoe.tools.deploy.deployment import Deployment
from tests.booted import Booted, booted, why_not
from tests.processes import eventually
from tests.secured import tls_server
from tests.tiny_federation import write_rows

pytestmark = [pytest.mark.one_server, pytest.mark.slow, pytest.mark.timeout(400)]
WORKER = "fedmoe-worker@sql-1"
RUNNING = ("fedmoe-redis", "fedmoe-aggregator", WORKER, "fedmoe-dashboard")
REDIS_DIR = Path("/var/lib/fedmoe-redis")
FEDMOE = "/opt/fedmoe/bin/fedmoe"
# As docs/runbook.md and the heads of the units say; /srv/here is the deployment with the model and the rows.
SETUP = """
cp -r {here} /srv/here
install -d -o fedmoe-redis -g fedmoe-redis -m 700 /var/lib/fedmoe-redis
cp -r /srv/here/redis.conf /srv/here/users.acl /srv/here/tls /var/lib/fedmoe-redis
rm /var/lib/fedmoe-redis/tls/ca.key && chown -R fedmoe-redis:fedmoe-redis /var/lib/fedmoe-redis
install -m 600 -o fedmoe -g fedmoe /srv/here/enrolments/*.toml /etc/fedmoe
mkdir /srv/fedmoe && cp -r {model} /srv/fedmoe/model && cp {rows} /srv/fedmoe/sql.jsonl
chown -R fedmoe:fedmoe /srv/fedmoe
umask 077
cat >/etc/fedmoe/aggregator.env <<'END'
FEDMOE_ENROLMENT=/etc/fedmoe/aggregator.toml
FEDMOE_AGGREGATOR_RUN_BASE_MODEL=/srv/fedmoe/model
FEDMOE_AGGREGATOR_RUN_EXPERT=sql_expert
FEDMOE_AGGREGATOR_RUN_RANK=2
FEDMOE_AGGREGATOR_RUN_SYNC_INTERVAL=0.5
END
echo FEDMOE_WORKER_RUN_DATA=/srv/fedmoe/sql.jsonl | tee /etc/fedmoe/worker-sql-1.env >/etc/fedmoe/worker-sql-2.env
echo FEDMOE_ENROLMENT=/etc/fedmoe/sql-1.toml >>/etc/fedmoe/worker-sql-1.env
echo FEDMOE_ENROLMENT=/etc/fedmoe/nobody.toml >>/etc/fedmoe/worker-sql-2.env
echo FEDMOE_ENROLMENT=/etc/fedmoe/monitor.toml >/etc/fedmoe/dashboard.env
echo FEDMOE_ENROLMENT=/etc/fedmoe/operator.toml >/etc/fedmoe/backup.env
umask 022
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[Booted]:
    if reason := why_not():
        pytest.skip(reason)
    if tls_server() != "/usr/bin/redis-server":
        pytest.skip("there is no /usr/bin/redis-server with TLS here (Debian: redis-server)")
    root = tmp_path_factory.mktemp("booted")
    worker = Party(role="worker", expert="sql_expert", name="sql-1")
    Deployment(directory=root / "here", hosts=["localhost"], workers=[worker], redis_dir=REDIS_DIR).write(
        now=0.0
    )
    rows = write_rows(root / "rows.jsonl", "a", 60)
    with booted(
        root / "systemd", SETUP.format(here=root / "here", model=tiny_model_dir, rows=rows)
    ) as running:
        running.ask("systemctl", "start", *RUNNING)
        yield running


def version(machine: Booted) -> int:
    """Of the expert, as the monitor sees it."""
    done = machine.ask(FEDMOE, "status", "--json", "--enrolment", "/etc/fedmoe/monitor.toml")
    (expert,) = json.loads(done)["experts"]
    return int(expert["meta"]["version"])


def why(machine: Booted) -> str:
    """The last lines of each unit in the journal."""
    return "\n".join(
        machine.run("journalctl", "--no-pager", "-n", "8", "-u", unit).stdout for unit in RUNNING
    )


def test_a_federation_trains_under_its_units(machine: Booted) -> None:
    """All closed as they are; each keeps its files in its own directory."""
    try:
        eventually("an update", lambda: version(machine) > 0, timeout_s=60)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{why(machine)}") from error
    assert [machine.state(unit)["ActiveState"] for unit in RUNNING] == ["active"] * 4
    owners = machine.ask("stat", "-c", "%U %a %n", "/var/lib/fedmoe/worker-sql-1", "/var/lib/fedmoe-redis")
    assert owners.split() == [
        "fedmoe", "755", "/var/lib/fedmoe/worker-sql-1", "fedmoe-redis", "700", "/var/lib/fedmoe-redis",
    ]  # fmt: skip
    alive = machine.ask(
        "sh", "-c", f"FEDMOE_ALIVE_FILE=/run/fedmoe-{'worker-sql-1'}/alive {FEDMOE} healthy; echo $?"
    )
    assert alive.split()[-1] == "0"


def test_the_dashboard_answers(machine: Booted) -> None:
    """On port 5000 of loopback."""
    get = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:5000/api/v1/federation').read().decode())"

    def listed() -> bool:
        experts = json.loads(machine.ask("python3", "-c", get))["experts"]
        return [one["name"] for one in experts] == ["sql_expert"]

    eventually("the expert on the dashboard", listed)


def test_users_that_are_enrolled_are_saved_for_redis_alone(machine: Booted) -> None:
    """ACL SAVE writes the file again, with the unit's umask."""
    out = "/srv/sql-9.toml"
    enrol = ("worker", "enrol", "sql-9", "--stream", "sql_expert", "--enrolment", "/etc/fedmoe/operator.toml")
    machine.ask(FEDMOE, *enrol, "--out", out)
    assert ":sql-9 " in machine.ask("cat", "/var/lib/fedmoe-redis/users.acl")
    assert machine.ask("stat", "-c", "%U %a", "/var/lib/fedmoe-redis/users.acl") == "fedmoe-redis 600\n"


def test_a_killed_process_starts_again(machine: Booted) -> None:
    """Redis, too, with all that it had."""
    before = version(machine)
    for unit in ("fedmoe-redis", "fedmoe-aggregator"):
        machine.ask("systemctl", "kill", "-s", "KILL", unit)
    eventually("the next update", lambda: version(machine) > before, timeout_s=120)
    states = [machine.state(unit) for unit in ("fedmoe-redis", "fedmoe-aggregator")]
    assert [(state["ActiveState"], state["NRestarts"]) for state in states] == [("active", "1")] * 2


def test_a_backup_is_made(machine: Booted) -> None:
    """By the unit that the timer starts."""
    machine.ask("systemctl", "start", "fedmoe-backup")
    assert "sql_expert" in machine.ask("sh", "-c", "ls /var/lib/fedmoe/backups/*")


def test_wrong_settings_are_not_tried_again(machine: Booted) -> None:
    """Exit code 2; the journal has one sentence, as an error."""
    machine.ask("systemctl", "start", "fedmoe-worker@sql-2")
    eventually("its end", lambda: machine.state("fedmoe-worker@sql-2")["ActiveState"] == "failed")
    state = machine.state("fedmoe-worker@sql-2")
    assert (state["ExecMainStatus"], state["NRestarts"]) == ("2", "0")
    said = machine.ask("journalctl", "-p", "err", "-u", "fedmoe-worker@sql-2", "-o", "cat")
    assert "nobody.toml" in said


def test_all_stop_cleanly_and_in_time(machine: Booted) -> None:
    """On SIGTERM, with exit code 0; the worker has written its checkpoint."""
    for unit in (WORKER, "fedmoe-aggregator", "fedmoe-dashboard", "fedmoe-redis"):
        machine.ask("systemctl", "stop", unit)
        state = machine.state(unit)
        assert (state["Result"], state["ExecMainStatus"]) == ("success", "0"), f"{unit}\n{why(machine)}"
    assert machine.ask("sh", "-c", "ls /var/lib/fedmoe/worker-sql-1").split()
