"""ops/monitoring and docs/monitoring.md are true to the code, as far as no Prometheus is needed to see it."""

import json
import re

import yaml

from fedmoe.settings import RedisSettings
from fedmoe.tools.metrics.table import METRICS, tables
from tests.documents import ROOT

MONITORING = ROOT / "ops" / "monitoring"
RULES = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
BOARD = json.loads((MONITORING / "grafana.json").read_text())
QUERIES = [one["expr"] for panel in BOARD["panels"] for one in panel.get("targets", ())]
PAGE = (ROOT / "docs" / "monitoring.md").read_text()
NOT_OURS = {"up", "process_resident_memory_bytes"}


def test_rules_and_board_name_metrics_that_exist() -> None:
    """A renamed metric would silence an alert, and empty a panel."""
    known = {one.name for one in METRICS} | NOT_OURS
    for query in (*QUERIES, *(rule["expr"] for rule in RULES)):
        used = set(re.findall(r"\b(?:fedmoe|process)_\w+|\bup\b", re.sub(r'"[^"]*"', "", query)))
        assert used, query
        assert used <= known


def test_names_follow_the_conventions() -> None:
    """Counters end in _total, times in seconds, sizes in bytes; a name stands once."""
    names = [one.name for one in METRICS]
    assert len(set(names)) == len(names)
    for one in METRICS:
        assert re.fullmatch(r"fedmoe_[a-z_]+", one.name)
        assert one.name.endswith("_total") == (one.kind == "counter"), one.name
        assert not re.search(r"_(ms|s|mib|kb|percent|count)(_|$)", one.name), one.name
        assert one.help.endswith("."), one.name


def test_the_page_has_the_tables_of_the_code() -> None:
    """After a change: `python -m fedmoe.tools.metrics.table` prints them."""
    assert tables() in PAGE


def test_every_alert_is_in_the_runbook() -> None:
    """With its severity, what it means and what to do; no other heading is an alert."""
    told = dict(re.findall(r"^### (FedMoE\w+)\n\n\*(\w+)\*: .+\n(?:.+\n)*\n\S.{20,}", PAGE, flags=re.M))
    assert told == {rule["alert"]: rule["labels"]["severity"] for rule in RULES}


def test_the_board_can_be_imported() -> None:
    """Panels do not overlap, and each query has its own letter."""
    fields: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & fields, panel["title"]
        fields |= cells
        letters = [one["refId"] for one in panel.get("targets", ())]
        assert len(set(letters)) == len(letters)
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_prometheus_waits_for_a_redis_that_hangs() -> None:
    """A scrape that takes longer than its time-out is lost, and `fedmoe_redis_up 0` with it."""
    scraping = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["global"]
    assert (
        float(scraping["scrape_timeout"].removesuffix("s"))
        > RedisSettings(url="redis://localhost").timeout_s + 1
    )
