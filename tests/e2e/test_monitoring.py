"""What ops/monitoring holds, against a real Prometheus that scrapes a real run: rules, alerts, queries of the board.

It needs Debian's `prometheus`, which brings promtool; without it these tests are skipped, and fail in CI.
"""

import json
import re
import socket
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmoe.protocol.records import HEARTBEAT_TTL_S
from fedmoe.store.connection import Connection
from fedmoe.store.worker import WorkerStore
from tests.documents import ROOT
from tests.looking import BEAT
from tests.processes import eventually, running
from tests.scraping import get, lint, program
from tests.tiny_federation import write_rows

pytestmark = pytest.mark.one_server

MONITORING = ROOT / "ops" / "monitoring"
RULES = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
BOARD = json.loads((MONITORING / "grafana.json").read_text())
QUERIES = [one["expr"] for panel in BOARD["panels"] for one in panel.get("targets", ())]
# What this run cannot have: it is not over TLS, and its Redis has no maxmemory.
EMPTY = {"fedmoe_redis_certificate_expiry_timestamp_seconds - time()", "fedmoe_redis_memory_max_bytes > 0"}
NOT_OURS = {"up", "process_resident_memory_bytes"}


def test_the_rules_and_their_tests_hold() -> None:
    """By promtool; each alert fires in one of its tests, and is silent in another."""
    for words in (
        ("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml"),
    ):  # fmt: skip
        done = subprocess.run(
            [program("promtool"), *words], cwd=MONITORING, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    cases = yaml.safe_load((MONITORING / "alerts_test.yml").read_text())["tests"]
    tried = [
        (one["alertname"], bool(one.get("exp_alerts"))) for case in cases for one in case["alert_rule_test"]
    ]
    alerts = {rule["alert"] for rule in RULES}
    assert {name for name, fires in tried if fires} == alerts
    assert {name for name, fires in tried if not fires} == alerts


class Prometheus:
    """A Prometheus of its own, asked over its API."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def ask(self, what: str, **arguments: str) -> Any:
        reply = json.loads(get(f"{self._url}/{what}?{urllib.parse.urlencode(arguments)}"))
        assert reply["status"] == "success", reply
        return reply["data"]

    def query(self, text: str) -> list[Any]:
        found: list[Any] = self.ask("query", query=text)["result"]
        return found

    def alerts(self, state: str) -> set[str]:
        return {one["labels"]["alertname"] for one in self.ask("alerts")["alerts"] if one["state"] == state}


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    """With the rules of ops/monitoring, every second, and the targets of targets/*.json."""
    path = program("prometheus")
    (tmp_path / "prometheus").mkdir()
    jobs = [
        {
            "job_name": job,
            "file_sd_configs": [{"files": [str(tmp_path / f"{job}.json")], "refresh_interval": "1s"}],
        }
        for job in ("fedmoe", "fedmoe-aggregator", "fedmoe-worker")
    ]
    settings = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(MONITORING / "alerts.yml")],
        "scrape_configs": jobs,
    }
    (tmp_path / "prometheus.json").write_text(json.dumps(settings))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (tmp_path / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [path, f"--config.file={tmp_path / 'prometheus.json'}", f"--web.listen-address=127.0.0.1:{port}",
             f"--storage.tsdb.path={tmp_path / 'prometheus'}"],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        asked = Prometheus(port)
        eventually("Prometheus answers", lambda: asked.ask("status/runtimeinfo"))
        yield asked
    finally:
        process.kill()
        process.wait()


def url_in(log: Path) -> str:
    """Where a process says that its metrics are served."""
    found = eventually(
        f"metrics in {log.name}", lambda: re.search(r"served on (http://\S+)", log.read_text())
    )
    return str(found[1])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_real_prometheus_scrapes_a_real_run(
    tmp_path: Path, redis_url: str, connection: Connection, tiny_model_dir: Path, prometheus: Prometheus
) -> None:
    """All targets are up, each query of the board has a result, no rule fails, and the right alerts fire."""
    data = write_rows(tmp_path / "rows.jsonl", "answer", 200)
    logs = {job: tmp_path / f"{job}.log" for job in ("fedmoe", "fedmoe-aggregator", "fedmoe-worker")}
    with (
        running(logs["fedmoe"], "metrics", "--redis", redis_url, "--port", "0"),
        running(
            logs["fedmoe-aggregator"], "aggregator", "run", "--redis", redis_url, "--expert", "a", "--rank", "2",
            "--base-model", str(tiny_model_dir), "--sync-interval", "0.3", "--metrics-port", "0", "--lease", "1",
            "--keep-updates", str(tmp_path / "kept"),
        ) as aggregator,
        running(
            logs["fedmoe-worker"], "worker", "run", "--redis", redis_url, "--stream", "a", "--data", str(data),
            "--name", "ann", "--metrics-port", "0", "--state-dir", str(tmp_path / "state"),
        ),
    ):  # fmt: skip
        for job, log in logs.items():
            target = urllib.parse.urlsplit(url_in(log)).netloc
            (tmp_path / f"{job}.json").write_text(json.dumps([{"targets": [target]}]))
        eventually("all targets", lambda: len(prometheus.query("up == 1")) == len(logs))
        eventually("updates", lambda: prometheus.query('fedmoe_expert_updates_total{outcome="applied"} > 3'))
        gone = WorkerStore(connection, "a", "bob")
        gone.beat(BEAT, ttl_s=HEARTBEAT_TTL_S)
        gone.leave("failed", "no memory")
        for log in logs.values():
            assert lint(get(url_in(log))) == ""
        for query in QUERIES:
            asked = query.replace("$expert", ".*").replace("$__rate_interval", "10s").replace("[1h]", "[10s]")
            if query in EMPTY:
                assert prometheus.query(asked) == []
            else:
                eventually(query, lambda asked=asked: prometheus.query(asked))
        eventually("the alert", lambda: "FedMoEWorkerFailed" in prometheus.alerts("firing"))
        (group,) = prometheus.ask("rules")["groups"]
        assert {rule["name"]: rule.get("lastError", "") for rule in group["rules"]} == {
            rule["alert"]: "" for rule in RULES
        }
        assert {rule["health"] for rule in group["rules"]} == {"ok"}
        late = {"FedMoEWorkerSilent"}  # a heartbeat may be late on a busy machine
        assert prometheus.alerts("firing") - late == {"FedMoEWorkerFailed"}
        aggregator.kill()
        eventually("the other alert", lambda: "FedMoEAggregatorSilent" in prometheus.alerts("pending"))
        assert prometheus.query('up{job="fedmoe-aggregator"} == 0')
