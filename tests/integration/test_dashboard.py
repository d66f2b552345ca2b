"""The dashboard over HTTP: what it answers, that it only reads, what it refuses, that nothing hostile gets through."""

import io
import json
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load

from fedmoe.protocol.beat import Beat
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.permissions import AGGREGATOR, MONITOR, acl_rules
from fedmoe.store.worker import WorkerStore
from tests.boards import Board, apply, beat, board, change_rules, hold_lease, lively, refuse
from tests.federation import ScriptedWorker, make_expert, serve, small_spec
from tests.guarded import KEYS, rights_of
from tests.looking import build_gateway
from tests.processes import eventually
from tests.proxy import Proxy

pytestmark = pytest.mark.one_server

PAGES = ("/", "/workers", "/events", "/experts/sql_expert", "/experts/sql_expert/workers/sql-a")
API = (
    "/api/openapi.json", "/api/v1/federation", "/api/v1/experts", "/api/v1/experts/sql_expert", "/api/v1/workers",
    "/api/v1/experts/sql_expert/workers/sql-a", "/api/v1/gateway", "/api/v1/redis", "/api/v1/history",
)  # fmt: skip
HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\x1b]0;owned\x07\u202e&quot;'\""


@pytest.fixture
def shown(connection: Connection) -> Iterator[Board]:
    """The dashboard of a lively federation with a refusal, a change and a gateway."""
    lively(connection)
    refuse(connection, "sql_expert", "sql-b", "its norm 12 is above the bound 3")
    change_rules(connection, "sql_expert", "lr 1 -> 0.5")
    build_gateway(connection)
    with board(connection.settings) as running:
        yield running


def raw(where: Board, request: str) -> tuple[int, str]:
    """Send a request as it stands, which no client would; status and text of the answer."""
    host, _, port = where.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(request.encode())
        answer = b""
        while piece := client.recv(65536):
            answer += piece
    text = answer.decode()
    return int(text.split()[1]), text


def test_prometheus_scrapes_the_federation(shown: Board) -> None:
    """What `fedmoe metrics` serves; behind a password for those who have it."""
    answer = shown.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'fedmoe_expert_version{expert="sql_expert"} 300.0' in answer.text
    assert "fedmoe_redis_up 1.0" in answer.text
    assert shown.get("/metrics", headers={"Accept": "text/plain;version=abc"}).status_code == 200
    redis = shown.watcher.connection.settings
    with board(redis, password="long enough") as guarded:  # noqa: S106  # of nobody
        assert guarded.get("/metrics").status_code in (303, 401)
        headers = {"Authorization": "Bearer long enough"}
        assert "fedmoe_redis_up 1.0" in guarded.get("/metrics", headers=headers).text


def test_what_happened_is_in_the_api(shown: Board) -> None:
    """Curves, throughput, staleness, contributions, refusals, changes, gateway, Redis."""
    expert = shown.get("/api/v1/experts/sql_expert").json()
    assert (expert["state"], expert["version"], expert["served_by"]) == ("serving", 300, "lab-aggregator")
    assert expert["training_curve"]["version"][-1] == 300
    assert {one["worker"] for one in expert["validation_curves"]} == {"sql-a", "sql-b", "sql-c"}
    assert sum(one["updates"] for one in expert["staleness"]) == 300
    assert expert["updates_per_min"] == pytest.approx(30, rel=0.2)
    assert sum(one["contribution"]["share"] for one in expert["workers"]) == pytest.approx(1)
    assert expert["refusals"][0]["reason"] == "its norm 12 is above the bound 3"
    assert expert["changes"][0]["text"] == "rules changed: lr 1 -> 0.5"
    worker = shown.get("/api/v1/experts/sql_expert/workers/sql-b").json()
    assert (worker["state"], worker["in_flight"], len(worker["refusals"])) == ("running", 3, 1)
    assert worker["training_curve"]["loss"]
    made_of = shown.get("/api/v1/gateway").json()["merged"]["made_of"]
    assert [(one["expert"], one["version"], one["is_outdated"]) for one in made_of] == [
        (name, 300, False) for name in ("docs_expert", "python_expert", "sql_expert")
    ]
    redis = eventually(
        "a round trip", lambda: (one := shown.get("/api/v1/redis").json())["latency_ms"] and one
    )
    assert redis["is_here"]
    assert redis["used_memory"] > 0
    assert redis["is_aof_on"] is False
    kinds = [one["kind"] for one in shown.get("/api/v1/history").json()["events"]]
    assert sorted(kinds) == ["changed", "refused"]


def test_workers_are_filtered_and_paged(shown: Board, connection: Connection) -> None:
    """By expert, text and life; a query that makes no sense is one sentence."""
    WorkerStore(connection, "sql_expert", "gone").leave("failed", "no disk")
    found = eventually(
        "the worker that failed",
        lambda: (one := shown.get("/api/v1/workers?q=FAILED").json())["total"] and one["workers"],
    )
    assert [(one["name"], one["problem"]) for one in found] == [("gone", "no disk")]
    assert shown.get("/api/v1/workers?expert=sql_expert&alive=true").json()["total"] == 3
    page = shown.get("/api/v1/workers?limit=2&offset=1").json()
    assert (page["total"], len(page["workers"])) == (10, 2)
    assert "2 to 10 of 10" in " ".join(shown.get("/workers?offset=1").text.split())
    for query in ("limit=0", "limit=1001", "limit=x", "offset=-1", "alive=yes", "limit=1e3", "limit=%D9%A3"):
        answer = shown.get(f"/api/v1/workers?{query}")
        assert (answer.status_code, answer.json()["error"]["about"]) == (400, query.partition("=")[0])


def test_the_api_is_what_its_document_says(shown: Board, tmp_path: Path) -> None:
    """A fuzzer of the document asks for everything, in ways that nobody would."""
    program = Path(sys.executable).parent / "schemathesis"
    done = subprocess.run(
        [program, "run", f"{shown.url}/api/openapi.json", "--exclude-path", "/api/v1/events", "--phases",
         "examples,fuzzing", "--max-examples", "10", "--checks", "all", "--no-color", "--seed", "1",
         "--suppress-health-check", "all"],
        capture_output=True, text=True, timeout=110, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
def test_it_cannot_be_asked_to_write(shown: Board, method: str) -> None:
    """No path takes anything but GET and HEAD; without a password not even the login."""
    port = shown.url.rpartition(":")[2]
    for path in (*PAGES, *API, "/api/v1/events", "/static/app.js", "/metrics", "/none"):
        status, text = raw(
            shown, f"{method} {path} HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n"
        )
        assert status == 405, path
        assert "allow: GET, HEAD" in text
        assert "the dashboard only reads" in text


@pytest.mark.parametrize(
    "path",
    ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static//etc/passwd",
     "/static/%2fetc/passwd",
     "/static/..%5capp.py", "/static/", "/static/%00", "/../../../../etc/passwd", "/templates/base.html",
     "/experts/..%2f..%2fsetup.cfg", "/api/v1/experts/..%2f..%2fetc/adapter", "//evil.example/"],
)  # fmt: skip
def test_nobody_leaves_its_directory(shown: Board, path: str) -> None:
    """Whatever dots and slashes are in a path; the answer quotes no file."""
    status, text = raw(shown, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    assert status in (403, 404, 405)
    assert not re.search("root:|import |{% ", text)
    assert "location:" not in text.lower()


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1", 200), ("127.0.0.1:5000", 200), ("localhost", 200), ("[::1]:5000", 200), ("10.1.2.3", 200),
     ("board.example:5000", 200), ("BOARD.example", 200), ("evil.example", 421), ("127.0.0.1.evil.example", 421),
     ("localhost.evil.example", 421), ("", 421), ("[evil]", 421), ("board.example.", 421),
     ("127.0.0.1:80/static/?", 421), ("localhost:1/login#", 421), ("[::1]/static/", 421), ("localhost:80@evil", 421)],
)  # fmt: skip
def test_pages_of_others_cannot_call_it_by_a_name_of_theirs(
    connection: Connection, host: str, status: int
) -> None:
    """DNS rebinding: a browser sends the name that the attacker's page has."""
    with board(connection.settings, allow_host=("board.example",)) as running:
        found, text = raw(
            running, f"GET /api/v1/experts HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        )
    assert found == status, text


def test_every_answer_tells_browsers_to_be_strict(shown: Board) -> None:
    """Pages, API, files and errors alike; no page has a script or a style inside, so the policy has no exception."""
    for path in (*PAGES, *API, "/static/app.js", "/none", "/experts/none", "/api/v1/none"):
        answer = shown.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == ("no-cache" if path.startswith("/static/") else "no-store")
        if answer.headers["content-type"].startswith("text/html"):
            assert not re.search(r"<script(?! src=)|\sstyle=|\son\w+=|https?://", answer.text), path
    script = shown.get("/static/app.js").text + shown.get("/static/style.css").text
    assert not re.search(
        r"https?://|innerHTML\s*=[^=]|eval\(", script
    )  # offline, and nothing is parsed as a script


def test_nothing_hostile_is_ever_rendered(connection: Connection) -> None:
    """Names and reasons with HTML, escapes for terminals and text that runs backwards."""
    make_expert(connection)
    apply(connection, "sql_expert", 20, workers=("alice", HOSTILE[:60]))
    hold_lease(connection, "sql_expert")
    hostile = Beat(run=HOSTILE, host=HOSTILE, software=HOSTILE, problem=HOSTILE)
    for name in ("alice", f"{HOSTILE[:40]}", "a/../b", ".."):
        connection.client.hset(
            f"fedmoe:{{sql_expert}}:worker:{name}", mapping=hostile.to_fields() | {"loss": HOSTILE}
        )
    refuse(connection, "sql_expert", HOSTILE, HOSTILE)
    change_rules(connection, "sql_expert", HOSTILE)
    connection.client.hset("fedmoe:{sql_expert}:problem", HOSTILE, HOSTILE)
    connection.client.hset("fedmoe:{merged}:meta", "error", HOSTILE)
    connection.client.hset("fedmoe:experts", HOSTILE, HOSTILE)
    connection.client.hset("fedmoe:{sql_expert}:meta", "base_model", HOSTILE)
    with board(connection.settings) as running:
        pages = [*PAGES[:4], "/experts/sql_expert/workers/alice", "/workers?q=%3Cscript%3E&expert=%22%3E%3Cb%3E",
                 "/experts/%3Cscript%3Ealert(1)%3C%2Fscript%3E"]  # fmt: skip
        texts = [running.get(path).text for path in pages]
        content = [running.get(path).text for path in (*API[1:5], "/api/v1/history")]
    assert "alert(1)" in "".join(texts)  # it is shown, as text
    for text in texts:
        assert not re.search(r"<script>|<img|<b>|[\x00-\x09\x0b-\x1f\x7f\u202e]", text)
    for text in content:
        assert not re.search("[\x00-\x1f\x7f\u202e]", json.dumps(json.loads(text), ensure_ascii=False))


def test_workers_that_claim_any_speed_stop_nothing(connection: Connection) -> None:
    """The sum of their speeds would be infinite, which JSON lacks."""
    make_expert(connection)
    with board(connection.settings) as running:
        for name in ("alice", "bob"):
            beat(connection, "sql_expert", name, tokens_per_s=1.7e308)
        running.watcher.look()
        assert running.get("/api/v1/federation").json()["totals"]["tokens_per_s"] > 1e308
        assert running.get("/").status_code == 200


def test_adapter_is_downloaded_whole(connection: Connection) -> None:
    """As PEFT loads it; unknown ones are named as such, and without --downloads there are none."""
    make_expert(connection)
    with board(connection.settings) as running:
        answer = running.get("/api/v1/experts/sql_expert/adapter")
        assert (answer.status_code, answer.json()["error"]["about"]) == (403, "downloads")
        assert "Download" not in running.get("/experts/sql_expert").text
    with board(connection.settings, downloads=True) as running:
        assert "Download the adapter" in running.get("/experts/sql_expert").text
        answer = running.get("/api/v1/experts/sql_expert/adapter")
        assert answer.headers["content-disposition"] == 'attachment; filename="sql_expert-v0.zip"'
        files = zipfile.ZipFile(io.BytesIO(answer.content))
        tensors = load(files.read("sql_expert-v0/adapter_model.safetensors"))
        assert sum(one.size for one in tensors.values()) == small_spec().layout.numel
        assert json.loads(files.read("sql_expert-v0/adapter_config.json"))["r"] == 2
        assert running.get("/api/v1/experts/none/adapter").status_code == 404
        assert running.get("/api/v1/gateway/adapter").status_code == 404
        build_gateway(connection)
        name = running.get("/api/v1/gateway/adapter").headers["content-disposition"]
        assert name == 'attachment; filename="merged-gateway-v0.zip"'


def test_monitoring_user_sees_everything_and_gives_no_weights_away(server: EmbeddedRedis) -> None:
    """A dashboard with the rights of `fedmoe doctor --acl monitor`: all pages, and one sentence for a download."""
    with (
        EmbeddedRedis(server=server.server, options=["--appendonly", "no"]) as own,
        Proxy(own.socket) as proxy,
    ):
        admin = Connection(RedisSettings(url=own.url))
        lively(admin)
        for role in (MONITOR, AGGREGATOR):
            admin.client.execute_command(
                "ACL", "SETUSER", role.name, "on", ">pw", *acl_rules(rights_of(role))
            )
        url = proxy.url.replace("redis://", "redis://monitor:pw@")
        with board(RedisSettings(url=url, prefix=KEYS.prefix), downloads=True) as running:
            for path in PAGES:
                assert running.get(path).status_code == 200, path
            redis = running.get("/api/v1/redis").json()
            assert redis["used_memory"]
            assert ":pw" not in running.get("/api/v1/federation").text + running.get("/").text
            assert "cannot be read" not in running.get("/").text
            refused = [
                dict(zip(one[::2], one[1::2], strict=True))
                for one in admin.client.execute_command("ACL", "LOG")
            ]
            assert [one for one in refused if one[b"object"] != b"client|setinfo"] == []
            answer = running.get("/api/v1/experts/sql_expert/adapter")
            assert (answer.status_code, answer.json()["error"]["about"]) == (403, "rights")
        admin.close()


def test_dashboard_outlives_its_redis(connection: Connection, server: EmbeddedRedis) -> None:
    """What was seen stays, with a sentence, while Redis is away; then it goes on. It may be away at the start, too."""
    lively(connection, experts=1, updates=20)
    with Proxy(server.socket) as proxy:
        address = proxy.url
        with board(RedisSettings(url=address, timeout_s=2.0)) as running:
            proxy.freeze()
            proxy.cut()
            away = eventually(
                "away", lambda: (one := running.get("/api/v1/federation").json())["redis"]["problem"] and one
            )
            assert away["findings"][0] == away["redis"]["problem"]
            assert [one["name"] for one in away["experts"]] == ["docs_expert"]
            page = running.get("/").text
            assert "Redis does not answer" in page
            assert "docs_expert" in page
            proxy.thaw()
            eventually("back", lambda: running.get("/api/v1/redis").json()["is_here"])
            texts = [one["text"] for one in running.get("/api/v1/history").json()["events"]]
            assert texts[0] == "Redis answers again"
    with board(RedisSettings(url="redis://127.0.0.1:1", timeout_s=2.0), look_first=False) as running:
        for path in (*PAGES[:3], *API[:3], *API[6:]):
            assert running.get(path).status_code == 200, path
        eventually("a sentence", lambda: "cannot be reached" in running.get("/").text)


def test_an_update_that_is_applied_is_seen(connection: Connection) -> None:
    """By the real aggregator's code, from a real worker's update: curves and contributions of what it wrote."""
    expert = make_expert(connection)
    alice = ScriptedWorker(connection, small_spec())
    with board(connection.settings) as running:
        alice.push(0.5)
        assert serve(expert) == ["applied"]
        alice.pull()
        alice.push(1e6)
        assert serve(expert) == ["refused"]
        beat(connection, "sql_expert", "alice")

        def seen() -> Any:
            one = running.get("/api/v1/experts/sql_expert").json()
            return one["workers"] and one["refusals"] and one

        content = eventually("both", seen)
    assert content["training_curve"] == {"version": [1], "loss": [1.5]}
    assert content["workers"][0]["contribution"] == {"updates": 1, "examples": 4, "share": 1.0}
    assert content["refusals"][0]["worker"] == "alice"
    assert "norm" in content["refusals"][0]["reason"]


def test_mistake_of_its_own_is_said_and_logged_once(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was seen stays, and the readers are told; it goes on once it can."""
    make_expert(connection)
    with board(connection.settings, interval_s=0.02) as running:
        with monkeypatch.context() as broken:
            broken.setattr(running.watcher, "_painter", None)
            eventually(
                "a sentence", lambda: "internal error" in running.get("/api/v1/redis").json()["problem"]
            )
            looks = running.watcher.last.number
            eventually("more looks", lambda: running.watcher.last.number > looks + 3)
            assert "sql_expert" in running.get("/").text
        eventually("it goes on", lambda: running.get("/api/v1/redis").json()["is_here"])
    assert sum(bool(one.exc_info) for one in caplog.records) == 1
