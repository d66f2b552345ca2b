"""The log of the daemons: one JSON object a line if asked for, and never a secret, whatever happens."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmoe.protocol.keys import Keys
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.permissions import AGGREGATOR, MONITOR, WORKER, acl_rules
from tests.processes import eventually, fedmoe, fedmoe_here, running, terminate
from tests.tiny_federation import write_rows

pytestmark = [pytest.mark.one_server, pytest.mark.slow]

# Passwords as people have them, escaped in a URL. None of them is part of another text of the run.
SECRETS = {"agg": "gr4velAgg/Pond", "ann": "w1ckerAnn?Fern", "mon": "m0thMon#Reed"}
ESCAPED = {"agg": "gr4velAgg%2FPond", "ann": "w1ckerAnn%3FFern", "mon": "m0thMon%23Reed"}
API_KEY = "k3yOfTheEndpoint"
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
Users = Callable[[str], str]


@pytest.fixture
def users(connection: Connection, server: EmbeddedRedis) -> Iterator[Users]:
    """Three ACL users with passwords; the URL of one of them."""
    keys = Keys("fedmoe")
    rights = {
        "agg": AGGREGATOR.rights(keys, "*", "*"),
        "ann": WORKER.rights(keys, "a", "ann"),
        "mon": MONITOR.rights(keys, "*", "*"),
    }
    for name, theirs in rights.items():
        rules = ("reset", "on", f">{SECRETS[name]}", *acl_rules(theirs))
        connection.client.execute_command("ACL", "SETUSER", name, *rules)
    yield lambda name: f"unix://{name}:{ESCAPED[name]}@{server.socket}"
    connection.client.execute_command("ACL", "DELUSER", *rights)


def objects(text: str) -> list[dict[str, Any]]:
    """Every line of an output, which must be an object with the documented fields."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert {"time", "level", "logger", "thread", "message"} <= line.keys() <= {
            "time", "level", "logger", "thread", "message", "exception",
        }  # fmt: skip
        assert RFC3339.fullmatch(line["time"])
        assert line["level"] in ("debug", "info", "warning", "error", "critical")
    return lines


def leaks(text: str) -> list[str]:
    """The secrets in an output, in any spelling."""
    return [one for one in (*SECRETS.values(), *ESCAPED.values(), API_KEY) if one in text]


def test_all_output_of_a_run_is_json_and_holds_no_secret(
    tmp_path: Path, connection: Connection, users: Users, tiny_model_dir: Path
) -> None:
    """Aggregator and worker with passwords in URL and environment: a start, training, an outage, a refusal, a stop."""
    data = write_rows(tmp_path / "rows.jsonl", "answer", 30)
    logs = [tmp_path / name for name in ("aggregator.log", "worker.log")]
    store = GatewayStore(connection)
    with (
        running(
            logs[0], "-v", "aggregator", "run", "--expert", "a", "--base-model", str(tiny_model_dir),
            "--rank", "2", "--sync-interval", "0.3", "--log-format", "json", FEDMOE_REDIS=users("agg"),
        ) as aggregator,
        running(
            logs[1], "worker", "run", "--redis", users("ann"), "--stream", "a", "--name", "ann", "--data", str(data),
            "--log-interval", "0.1", FEDMOE_LOG_FORMAT="json", FEDMOE_LOG_LEVEL="debug",
        ) as worker,
    ):  # fmt: skip
        eventually("two updates", lambda: store.meta("a").version >= 2)
        connection.client.xadd("fedmoe:{a}:updates", {"worker": "\x1b[2Jevil\u2028{", "<b>": "x"})
        eventually("garbage", lambda: store.meta("a").garbage >= 1)
        connection.client.execute_command("ACL", "SETUSER", "ann", "off")
        connection.client.execute_command("CLIENT", "KILL", "USER", "ann")
        eventually("the refused login", lambda: '"level": "warning"' in logs[1].read_text())
        connection.client.execute_command("ACL", "SETUSER", "ann", "on")
        version = store.meta("a").version
        eventually("updates again", lambda: store.meta("a").version > version)
        assert terminate(worker) == 0
        assert terminate(aggregator) == 0
    texts = [log.read_text() for log in logs]
    assert [leaks(text) for text in texts] == [[], []]
    said = [objects(text) for text in texts]
    assert any("removed garbage" in one["message"] for one in said[0])
    assert any("works again" in one["message"] for one in said[1])
    assert any("step " in one["message"] for one in said[1])
    for text in texts:
        assert text.isascii()
        assert not set("".join(one["message"] for one in objects(text))) & set("\x1b\x07\x9b\u2028\x00")


def test_a_refused_login_names_no_password(users: Users, server: EmbeddedRedis) -> None:
    """A wrong password is one sentence with exit code 2, in both forms and with every debug message."""
    wrong = f"unix://ann:{ESCAPED['agg']}@{server.socket}"
    run = (
        "-v",
        "aggregator",
        "run",
        "--expert",
        "a",
        "--no-wait",
        "--log-format",
        "json",
        "--log-level",
        "debug",
    )
    as_json, as_text = fedmoe(*run, FEDMOE_REDIS=wrong), fedmoe_here("expert", "list", "--redis", wrong)
    for done in (as_json, as_text):
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert leaks(done.stderr) == []
        assert "Traceback" not in done.stderr
    assert objects(as_json.stderr)[-1]["level"] == "error"
    assert as_text.stderr.startswith("fedmoe: ")


def test_other_commands_show_no_secret(tmp_path: Path, users: Users) -> None:
    """Settings from a file, and what monitors read."""
    file = tmp_path / "fedmoe.toml"
    file.write_text(
        f'redis = "{users("mon")}"\nlog_format = "json"\n[gateway.serve]\napi_key = "{API_KEY}"\n'
    )
    for arguments in (
        ("config", "show"), ("config", "check", str(file)), ("status",), ("status", "--json"), ("expert", "list"),
        ("doctor", "--role", "monitor"),
    ):  # fmt: skip
        done = fedmoe_here("--config", str(file), *arguments)
        assert leaks(done.stdout + done.stderr) == [], arguments
        assert "Traceback" not in done.stderr
    assert "(a secret)" in fedmoe_here("--config", str(file), "config", "show", "gateway", "serve").stdout


def test_both_forms_are_settings_of_the_file(tmp_path: Path) -> None:
    """`log_format` at the top of the file counts for all daemons; a wrong one is named before anything begins."""
    file = tmp_path / "fedmoe.toml"
    file.write_text('log_format = "json"')
    (line,) = objects(fedmoe("--config", str(file), "worker", "run", "--stream", "a:b", "--data", "x").stderr)
    assert (line["level"], "a:b" in line["message"]) == ("error", True)
    file.write_text('log_format = "xml"')
    done = fedmoe_here("config", "check", str(file))
    assert done.returncode == 2
    assert "log_format" in done.stderr


def test_libraries_do_not_speak_through_our_log() -> None:
    """Below WARNING only FedMoE's own loggers are heard, also with -v."""
    code = (
        "import logging, sys\n"
        "from fedmoe.util.log import start_log\n"
        "start_log('debug')\n"
        "for name in ('matplotlib.font_manager', 'fedmoe.x', 'producers.x', 'consumers.x', 'transformers'):\n"
        "    for level in (10, 20, 30, 40): logging.getLogger(name).log(level, name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heard = [line.split(maxsplit=1)[1] for line in done.stderr.splitlines()]
    ours = [f"{level} {name}.x" for name in ("fedmoe", "producers", "consumers") for level in
            ("DEBUG", "INFO", "WARNING", "ERROR")]  # fmt: skip
    libraries = ["WARNING matplotlib.font_manager", "ERROR matplotlib.font_manager", "ERROR transformers"]
    assert sorted(heard) == sorted(ours + libraries)
