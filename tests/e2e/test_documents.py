"""The commands of README and docs, typed one after the other in one shell, as a reader would.

A federation of a tiny model comes to be by the quickstart's own lines and is there for all pages. Each command must end
with exit code 0. What cannot be typed here is in NOT_TYPED, with the reason; what must read otherwise here is in
INSTEAD. A command of a page that is in neither is run.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmoe.demo.datasets import HELD_OUT
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import find_server
from fedmoe.store.gateway import GatewayStore
from tests.documents import PAGES, ROOT, SECURED, Command, commands, mentions, name_of
from tests.processes import environment, eventually

EXPERTS = ("python_expert", "sql_expert", "docs_expert")
FIRST = (
    "docs/quickstart.md", "README.md", "docs/serving.md", "docs/operate.md", "docs/runbook.md", "docs/redis-cli.md",
)  # fmt: skip

MINUTES, TESTS = "takes minutes; continuous integration runs it", "the suite itself runs it"
SETUP, WRITES = (
    "changes the environment that runs the tests",
    "writes into the repository; a test compares the page",
)
SYSTEM, DAEMON = "changes the system that runs the tests; a test checks the units", "needs Docker's daemon"
NOT_TYPED = {
    "bash ops/demo.sh": MINUTES,
    "bash ops/chaos.sh --kills 60": MINUTES,
    "bash ops/chaos.sh --cluster --kills 100": MINUTES,
    **{
        f"fedmoe {what} --redis cluster://node-1:6379,node-2:6379,node-3:6379?ssl=true":
            "needs a cluster; test_cluster_federation.py runs it on one"
        for what in ("status", "doctor")
    },
    **dict.fromkeys(
        (
            "fedmoe init federation --beside 'cluster://admin:PASSWORD@node-1?ssl_ca_certs=ca.crt'",
            "fedmoe --config federation/fedmoe.toml doctor",
        ), "needs a cluster; test_cluster_users.py runs it on one",
    ),
    "bash ops/test.sh": "is what runs this test",
    "bash ops/test.sh tests/unit -k ledger": "is what runs this test",
    "bash ops/bench.sh --out bench.json": "takes forty minutes; a test runs a tiny one",
    "bash ops/bench.sh --quick --out bench.json": "takes eight minutes; a test runs a tiny one",
    "bash ops/bench.sh --only scale": "takes a quarter of an hour; a test runs a tiny one",
    "bash ops/bench.sh --only scale --quick": "takes minutes; a test runs a tiny one",
    "bash ops/bench.sh --only codec": "a test runs a tiny one",
    "bash ops/bench.sh --quick --only codec": "a test runs a tiny one",
    "bash ops/bench.sh --only stages": "a test runs a tiny one",
    "bash ops/bench.sh --quick --only stages": "a test runs a tiny one",
    "bash ops/bench.sh --only exchange": "a test runs a tiny one",
    "bash ops/bench.sh --only quality": "trains for minutes",
    "bash ops/bench.sh --only learning --quick": "trains for minutes",
    "bash ops/bench.sh --only learning --keep bench-learning": "trains for hours",
    "bash ops/bench.sh --only learning --part main formats --rows 32 --keep bench-learning": "trains for hours",
    "bash ops/bench.sh --only learning --part shared --keep bench-learning": "trains for hours",
    "bash ops/bench.sh --only learning --part real --keep bench-learning": "trains for minutes; a test runs a tiny one",
    ".venv/bin/python -m ops.bench.learning bench-learning": "needs what the one before keeps",
    ".venv/bin/python -m ops.bench.learning ops/bench/learning/measured": WRITES,
    "bash ops/bench.sh --only learning --part time --keep ops/bench/learning/measured": "trains for hours",
    "bash ops/bench.sh --only routing --rows 32": "computes for minutes",
    "bash ops/bench.sh --only flower": "installs Flower",
    "bash ops/bench.sh --only tls": "a test runs a tiny one",
    "bash ops/bench.sh --only cluster": "a test runs a tiny one",
    "bash ops/bench.sh --quick --only cluster": "a test runs a tiny one",
    "bash ops/bench.sh --only before --before REV": "a test lets a release take turns",
    "bash ops/bench.sh --quick --only before --before 0dea90b": "a test lets a release take turns",
    "bash ops/bench.sh --quick --only race": "installs Flower, and takes half an hour; a test runs our side",
    "bash ops/bench.sh --quick --only race --keep bench-race": "the same",
    "fedmoe gateway export --out routed --router domain": "only one expert here has a worker; test_router.py runs it",
    "fedmoe gateway export --out routed-two --router domain --leave-out docs_expert": "the same",
    ".venv/bin/python -m tests.hazards": TESTS,
    ".venv/bin/python -m tests.hazards H05": TESTS,
    ".venv/bin/python -m tests.protocol --scope small": TESTS,
    ".venv/bin/python -m fedmoe.cli.page > docs/settings.md": WRITES,
    ".venv/bin/python -m tests.hazards.page > docs/hazards.md": WRITES,
    "python3 -m venv .venv": SETUP,
    ".venv/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu": SETUP,
    "pip install .": SETUP,
    "pip install '.[secure]'": SETUP,
    ".venv/bin/python -m tests.forbidden": "test_forbidden.py tries the same",
    "pip install pre-commit": SETUP,
    "pre-commit install": SETUP,
    "python3 -m venv /opt/fedmoe && /opt/fedmoe/bin/pip install '.[dashboard,metrics]'": SETUP,
    "install -m 644 ops/systemd/fedmoe.sysusers.conf /etc/sysusers.d/fedmoe.conf && systemd-sysusers": SYSTEM,
    "install -m 644 ops/systemd/fedmoe*.service ops/systemd/fedmoe*.timer /etc/systemd/system/": SYSTEM,
    "fedmoe init federation --host the-redis --redis-dir /var/lib/fedmoe-redis --worker sql_expert/sql-1":
        "test_secured_pages.py types the same without --redis-dir, test_units.py uses it",
    "install -d -o fedmoe-redis -g fedmoe-redis -m 700 /var/lib/fedmoe-redis": SYSTEM,
    "cp -r federation/redis.conf federation/users.acl federation/tls /var/lib/fedmoe-redis": SYSTEM,
    "rm /var/lib/fedmoe-redis/tls/ca.key && chown -R fedmoe-redis:fedmoe-redis /var/lib/fedmoe-redis": SYSTEM,
    "systemctl daemon-reload": SYSTEM,
    "systemctl enable --now fedmoe-redis fedmoe-aggregator fedmoe-worker@sql-1 fedmoe-dashboard fedmoe-backup.timer":
        SYSTEM,
    "journalctl -p warning -u fedmoe-aggregator -u 'fedmoe-worker@*'": SYSTEM,
    "docker build -f ops/container/Dockerfile -t fedmoe .": DAEMON,
    "docker compose -f ops/container/compose.yaml up -d": DAEMON,
    "docker compose -f ops/container/compose.yaml run --rm backup": DAEMON,
    "kubectl apply -k ops/kubernetes": "needs a cluster; a test checks the manifests",
    "fedmoe top": "needs a terminal; test_top.py runs it in one",
    "prometheus --config.file=ops/monitoring/prometheus.yml": "runs on and on; test_monitoring.py runs another one",
    "promtool check rules ops/monitoring/alerts.yml": "test_monitoring.py runs it",
    "promtool test rules ops/monitoring/alerts_test.yml": "test_monitoring.py runs it",
    "vllm serve Qwen/Qwen2.5-0.5B-Instruct --enable-lora --max-lora-rank 64 --lora-modules gateway=gw":
        "vLLM is not installed",
    **dict.fromkeys(SECURED, "test_secured_pages.py types it, over TLS"),
    "fedmoe gateway follow --dir versions --vllm http://127.0.0.1:8000": "vLLM is not installed",
}  # fmt: skip
# What the reader must put in for himself, and we do.
INSTEAD = {
    "redis://127.0.0.1:6379/0": "unix://{socket}",
    "http://127.0.0.1:5000/": "http://127.0.0.1:{port}/",
    "--host 0.0.0.0 --port 5001": "--host 127.0.0.1 --port 0",
    "--steps 200": "--steps 20",
}
# They run until they are stopped: typed in a terminal of their own.
ON_AND_ON = (
    "redis-server ", "fedmoe aggregator run", "fedmoe worker run", "fedmoe status --watch", "fedmoe gateway serve",
    "fedmoe dashboard",
)  # fmt: skip
SCRIPTS = {
    "bash ops/bench.sh": "ops.bench",
    "bash ops/chaos.sh": "tests.chaos",
    ".venv/bin/python -m tests.hazards": "tests.hazards",
    ".venv/bin/python -m tests.protocol": "tests.protocol",
}


class Shell:
    """A bash that reads commands as they come, in a directory with what a reader has: the checkout, and data."""

    def __init__(self, directory: Path, base_model: Path) -> None:
        self.directory, self.socket, self._count = directory, directory / "redis.sock", 0
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])  # of the dashboard
        for name in ("ops", "docs", "examples"):
            (directory / name).symlink_to(ROOT / name)
        for name in ("bin", "home", "held-out", "training", "validation"):
            (directory / name).mkdir()
        self._write_data()
        self._write_program(
            "redis-server", find_server(), f"--port 0 --unixsocket {self.socket} --dir {directory}"
        )
        cli = shutil.which("redis-cli") or "true"  # the server that comes as a wheel has none
        self._write_program("redis-cli", cli, f"-e -s {self.socket}", first=True)
        if not shutil.which("curl"):
            self._write_program("curl", "true")
        self._write_program("python", sys.executable)
        programs = f"{directory / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        settings = {
            "BASE_MODEL": str(base_model), "RANK": "2", "SYNC_INTERVAL": "0.5", "KEEP_UPDATES": "kept",
        }  # fmt: skip
        self._environment = environment(
            PATH=programs, HOME=str(directory / "home"), FEDMOE_RUN_DIR=str(directory / "run"),
            FEDMOE_DASHBOARD_PORT=str(self.port), FEDMOE_BIN=str(Path(sys.executable).parent / "fedmoe"), PS1="",
            **{f"FEDMOE_AGGREGATOR_RUN_{name}": value for name, value in settings.items()},
        )  # fmt: skip
        source, typed = os.pipe()
        self._typed = os.fdopen(typed, "w")
        self._bash = subprocess.Popen(
            ["bash", f"/dev/fd/{source}"], pass_fds=[source], cwd=directory, env=self._environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        os.close(source)

    def _write_data(self) -> None:
        rows = [json.dumps({"prompt": f"number {n}", "completion": str(n)}) for n in range(3 * HELD_OUT)]
        files = ["private.jsonl", "python.jsonl", *(f"training/{name}.jsonl" for name in EXPERTS)]
        for file in files:
            (self.directory / file).write_text("\n".join(rows))
        for name in EXPERTS:
            (self.directory / "held-out" / f"{name}.jsonl").write_text("\n".join(rows[:4]))
            (self.directory / "validation" / f"{name}.valid.jsonl").write_text("\n".join(rows[4:8]))

    def _write_program(self, name: str, program: str, options: str = "", *, first: bool = False) -> None:
        words = f'{options} "$@"' if first else f'"$@" {options}'
        path = self.directory / "bin" / name
        path.write_text(f"#!/bin/sh\nexec {shlex.quote(program)} {words}\n")
        path.chmod(0o755)

    def type(self, text: str) -> tuple[int, str]:
        """Type a command; its exit code, and what it printed."""
        self._count += 1
        end = f"== end of {self._count} =="
        self._typed.write(f"{text}\nprintf '\\n{end}%s\\n' \"$?\"\n")
        self._typed.flush()
        printed: list[str] = []
        assert self._bash.stdout
        for line in self._bash.stdout:
            if line.startswith(end):
                return int(line.removeprefix(end)), "".join(printed)
            printed.append(line)
        raise AssertionError(f"the shell has ended: {''.join(printed)}")

    def open_terminal(self, text: str) -> Path:
        """Type a command that goes on and on in another terminal; the file of what it prints."""
        log = self.directory / f"terminal-{self._count}.log"
        code, printed = self.type(f"{text} >{log} 2>&1 &")
        assert code == 0, printed
        return log

    def close(self) -> None:
        """End all that was started."""
        self._typed.close()
        stop = ["bash", str(ROOT / "ops" / "stop_all.sh")]
        subprocess.run(stop, env=self._environment, check=False, capture_output=True)
        os.killpg(self._bash.pid, signal.SIGKILL)
        self._bash.wait()


@pytest.fixture
def shell(tiny_model_dir: Path) -> Iterator[Shell]:
    """A shell, in a directory whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="fedmoe-docs-") as directory:
        made = Shell(Path(directory), tiny_model_dir)
        try:
            yield made
        finally:
            made.close()


def is_ready(text: str, shell: Shell, log: Path) -> bool:
    """True once what was started in another terminal does what the next command of a page counts on."""
    if text.startswith("fedmoe status"):
        return "sql_expert" in log.read_text()
    if text.startswith("fedmoe dashboard"):
        return "dashboard on http://" in log.read_text()
    store = GatewayStore(Connection(RedisSettings(url=f"unix://{shell.socket}")))
    if text.startswith("redis-server"):
        store.connection.ping()
    elif text.startswith("fedmoe aggregator"):
        return all(store.meta(name).commit for name in EXPERTS) and store.load_merged() is not None
    else:
        return store.meta("sql_expert").applied > 0
    return True


def typed(one: Command, shell: Shell) -> str:
    """Type one command; "" or what was wrong with it."""
    text = one.text
    for theirs, ours in INSTEAD.items():
        text = text.replace(theirs, ours.format(socket=shell.socket, port=shell.port))
    if not text.startswith(ON_AND_ON):
        code, printed = shell.type(text)
        return f"{one}\nexit code {code}\n{printed}" if code else ""
    log = shell.open_terminal(text)
    try:
        eventually(text, lambda: is_ready(text, shell, log), timeout_s=120)
    except AssertionError as error:
        return f"{one}\n{error}\n{log.read_text()}"
    return ""


@pytest.mark.timeout(1200)
def test_commands_of_the_pages_run(shell: Shell) -> None:
    """Each of them once, in the order of the pages; all that go wrong are named."""
    pages = sorted(
        PAGES, key=lambda page: (FIRST.index(name_of(page)) if name_of(page) in FIRST else 99, page)
    )
    once = {one.text: one for page in reversed(pages) for one in reversed([*commands(page)])}
    wrong = [
        problem
        for one in sorted(once.values(), key=lambda one: (pages.index(ROOT / one.page), one.line))
        if one.text not in NOT_TYPED and (problem := typed(one, shell))
    ]
    assert wrong == [], "\n\n".join(wrong)


def test_reasons_are_those_of_commands_that_are_there() -> None:
    """What no page says any more needs no reason."""
    there = {one.text for page in PAGES for one in commands(page)}
    assert NOT_TYPED.keys() - there == set()
    assert {text for text in INSTEAD if not any(text in one for one in there)} == set()


@pytest.mark.parametrize(("script", "module"), SCRIPTS.items())
def test_options_of_scripts_exist(script: str, module: str) -> None:
    """Those that no test runs as they stand in a page."""
    said = [one for page in PAGES for one in mentions(page, re.escape(script))]
    assert said
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for one in said:
        for option in re.findall(r"(?<!\S)--[\w-]+", one.text):
            assert re.search(rf"{option}\b", done.stdout), one
