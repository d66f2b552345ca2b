"""The dashboard's clients: who logs in, who listens to events; and how the command starts and ends."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.tools import http_server
from fedmoe.tools.dashboard import login as login_module
from fedmoe.tools.dashboard import pages, watcher
from tests.boards import Board, board, lively, refuse
from tests.processes import eventually, fedmoe_here, running, terminate

pytestmark = pytest.mark.one_server

PASSWORD = "correct horse battery"  # noqa: S105  # of nobody
COOKIE = login_module.COOKIE


@pytest.fixture
def locked(connection: Connection) -> Iterator[Board]:
    """A dashboard with a password."""
    lively(connection, experts=1, updates=20)
    with board(connection.settings, password=PASSWORD) as found:
        yield found


def log_in(where: Board, password: str = PASSWORD, *, target: str = "", **headers: str) -> httpx2.Response:
    """Send the form."""
    return httpx2.post(
        f"{where.url}/login{target}", data={"password": password}, headers=headers, timeout=20.0
    )


def test_nothing_is_shown_without_a_session(locked: Board) -> None:
    """Pages lead to the form, the API says what to do; a session or the password opens both."""
    answer = locked.get("/experts/docs_expert?x=1")
    assert (answer.status_code, answer.headers["location"]) == (
        303,
        "/login?next=%2Fexperts%2Fdocs_expert%3Fx%3D1",
    )
    for path in ("/api/v1/federation", "/api/openapi.json", "/api/v1/events", "/api/v1/none"):
        answer = locked.get(path)
        assert (answer.status_code, answer.json()["error"]["about"]) == (401, "login")
        assert "docs_expert" not in answer.text
    assert locked.get("/static/style.css").status_code == 200
    answer = log_in(locked)
    assert answer.status_code == 303
    cookie = answer.headers["set-cookie"]
    for part in ("HttpOnly", "SameSite=strict", "Path=/", "Max-Age=43200"):
        assert part in cookie
    token = answer.cookies[COOKIE]
    assert "docs_expert" in locked.get("/", cookies={COOKIE: token}).text
    bearer = {"Authorization": f"Bearer {PASSWORD}"}
    assert locked.get("/api/v1/experts", headers=bearer).status_code == 200
    left = httpx2.post(f"{locked.url}/logout", cookies={COOKIE: token})
    assert left.headers["location"] == "/login"
    assert locked.get("/", cookies={COOKIE: token}).status_code == 303


def test_forged_tokens_open_nothing(locked: Board) -> None:
    """A changed one, a long one, one that is no text, the password in the cookie."""
    token = log_in(locked).cookies[COOKIE]
    for forged in (
        token[:-1] + ("A" if token[-1] != "A" else "B"),
        token.lower(),
        "",
        "x" * 5000,
        PASSWORD,
        "\xff",
    ):
        answer = locked.get("/api/v1/experts", headers={"Cookie": f"{COOKIE}={forged}".encode("latin-1")})
        assert (answer.status_code, answer.json()["error"]["about"]) == (401, "login"), forged
    for header in ("Bearer", "Bearer x", f"Basic {PASSWORD}", PASSWORD):
        assert locked.get("/api/v1/experts", headers={"Authorization": header}).status_code == 401, header


def test_guessing_is_slow(locked: Board) -> None:
    """After five wrong passwords in a minute the sixth is not even compared, in the form or as a bearer token."""
    for _ in range(login_module.ATTEMPTS):
        answer = log_in(locked, "guess")
        assert answer.status_code == 401
        assert "That is not the password." in answer.text
        assert "set-cookie" not in answer.headers
    answer = log_in(locked)
    assert answer.status_code == 429
    assert 0 < int(answer.headers["retry-after"]) <= 60
    answer = locked.get("/api/v1/experts", headers={"Authorization": f"Bearer {PASSWORD}"})
    assert (answer.status_code, answer.json()["error"]["about"]) == (429, "login")


def guess(where: Board, forwarded: str) -> int:
    """One wrong password, with this X-Forwarded-For."""
    return log_in(where, "guess", **{"X-Forwarded-For": forwarded}).status_code


def test_a_client_does_not_choose_its_address(locked: Board) -> None:
    """By default nobody's X-Forwarded-For is believed."""
    assert [guess(locked, f"10.0.0.{i}") for i in range(login_module.ATTEMPTS + 1)] == [401] * 5 + [429]


def test_clients_behind_a_proxy_are_told_apart(connection: Connection) -> None:
    """By the last address that is no proxy's, which the proxy itself has added; what the client put before is not."""
    with board(
        connection.settings, password=PASSWORD, forwarded_allow_ips=("127.0.0.1", "10.0.0.9")
    ) as behind:
        said = [guess(behind, f"10.0.0.9, 10.9.9.{i}, 10.0.0.1") for i in range(login_module.ATTEMPTS + 1)]
        assert said == [401] * 5 + [429]
        assert guess(behind, "10.0.0.1, 10.0.0.9") == 429  # through two proxies
        assert guess(behind, "10.0.0.2") == 401
        by_tls = log_in(behind, **{"X-Forwarded-For": "10.0.0.3", "X-Forwarded-Proto": "https"})
        assert "; Secure" in by_tls.headers["set-cookie"]
        assert "; Secure" not in log_in(behind, **{"X-Forwarded-For": "10.0.0.3"}).headers["set-cookie"]
    with board(connection.settings, password=PASSWORD, forwarded_allow_ips=("10.0.0.9",)) as elsewhere:
        said = [guess(elsewhere, f"10.0.0.{i}") for i in range(login_module.ATTEMPTS + 1)]
        assert said == [401] * 5 + [429]


def test_a_form_of_many_fields_is_a_wrong_password(locked: Board) -> None:
    """Not an internal error with a traceback in the log: anybody may send one."""
    many = {f"field{i}": "1" for i in range(50)}
    assert httpx2.post(f"{locked.url}/login", data=many).status_code == 401


def test_pages_of_others_cannot_log_somebody_in_or_out(locked: Board) -> None:
    """A form on another page; and a target that leads away from the dashboard."""
    session = {COOKIE: log_in(locked).cookies[COOKIE]}
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        assert log_in(locked, **headers).status_code == 403
        assert httpx2.post(f"{locked.url}/logout", headers=headers, cookies=session).status_code == 403
        assert locked.get("/", cookies=session).status_code == 200
    for target in (
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "/%0d%0aX: y",
    ):
        answer = log_in(locked, target=f"?next={target}")
        assert answer.headers["location"] == "/", target
    assert log_in(locked, target="?next=/workers").headers["location"] == "/workers"
    assert log_in(locked, "x" * 100_000).status_code == 401


# ---- events ---------------------------------------------------------------------------------------------------------


class Listener:
    """A client of the event stream, reading in a thread."""

    def __init__(self, where: Board, **headers: str) -> None:
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self._stream = httpx2.stream(
            "GET", f"{where.url}/api/v1/events", headers=headers, timeout=httpx2.Timeout(30.0)
        )
        self._response = self._stream.__enter__()
        self.type = self._response.headers["content-type"]
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        kind = ""
        try:
            for line in self._response.iter_lines():
                if line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    self.heard.append((kind, json.loads(line.removeprefix("data: "))))
        except httpx2.HTTPError:
            return

    def of(self, kind: str) -> list[dict[str, Any]]:
        """What it heard of this kind."""
        return [content for one, content in list(self.heard) if one == kind]

    def ended(self, timeout_s: float) -> bool:
        """True once the dashboard has ended the stream."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


def test_clients_hear_of_looks_and_events(connection: Connection) -> None:
    """At once, and of each event once; a client that comes back hears of what it missed."""
    lively(connection, experts=1, updates=20)
    with board(connection.settings) as where:
        one = Listener(where)
        assert one.type.startswith("text/event-stream")
        eventually("a look", lambda: one.of("look"))
        refuse(connection, "docs_expert", "docs-a", "norm", seq=1)
        refuse(connection, "docs_expert", "docs-a", "norm", seq=2)
        eventually("two events", lambda: len(one.of("event")) == 2)
        assert [event["text"][:36] for event in one.of("event")] == [
            "docs_expert: update 1 of docs-a was ", "docs_expert: update 2 of docs-a was ",
        ]  # fmt: skip
        numbers = [look["number"] for look in one.of("look")]
        assert numbers == sorted(set(numbers))
        late = Listener(where, **{"Last-Event-ID": str(one.of("event")[0]["number"])})
        eventually("what it missed", lambda: late.of("event"))
        assert late.of("event") == one.of("event")[1:]
        new = Listener(where, **{"Last-Event-ID": "nonsense"})
        eventually("all of them", lambda: len(new.of("event")) == 2)
        assert new.ended(0.0) is False
    assert all(client.ended(10.0) for client in (one, late, new))


def test_many_clients_cost_redis_no_more_than_one(connection: Connection) -> None:
    """One reader looks for all of them; without any it looks less often."""
    lively(connection, experts=1, updates=20)

    def infos() -> int:
        return int(connection.client.info("commandstats")["cmdstat_info"]["calls"])

    with board(connection.settings, interval_s=0.05) as where:
        clients = [Listener(where) for _ in range(20)]
        eventually("all listen", lambda: all(client.of("look") for client in clients))
        before, looks = infos(), where.watcher.last.number
        eventually("ten looks", lambda: where.watcher.last.number >= looks + 10)
        assert infos() - before <= where.watcher.last.number - looks + 3
        assert len(where.dashboard.hub) == 20


def test_client_that_takes_nothing_is_dropped(connection: Connection) -> None:
    """It must not hold memory, nor keep others waiting."""
    lively(connection, experts=1, updates=20)
    with board(connection.settings, interval_s=0.01) as where:
        hub = where.dashboard.hub
        hub.send_s = 0.3
        where.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # so that it is soon full
        host, _, port = where.url.removeprefix("http://").partition(":")
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            slow.connect((host, int(port)))
            slow.sendall(b"GET /api/v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            quick = Listener(where)

            def is_dropped() -> bool:
                for seq in range(40):
                    refuse(connection, "docs_expert", "docs-a", "norm " * 50, seq=seq)
                return hub.dropped == 1

            eventually("it is dropped", is_dropped)
            heard = len(quick.of("look"))
            eventually("the other hears on", lambda: len(quick.of("look")) > heard)
            assert len(hub) == 1


@pytest.mark.parametrize(
    ("first", "start"),
    [(b"", b""), (b"", b"GET /login HTT"), (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET / HTT")],
)
def test_client_that_does_not_finish_its_request_is_dropped(
    locked: Board, monkeypatch: pytest.MonkeyPatch, first: bytes, start: bytes
) -> None:
    """Else a thousand of them would keep everybody out, for ever."""
    monkeypatch.setattr(http_server, "REQUEST_S", 0.3)
    host, _, port = locked.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        if first:
            slow.sendall(first)
            assert slow.recv(65_536).startswith(b"HTTP/1.1 303 ")
        slow.sendall(start)
        while slow.recv(65_536):
            pass


def test_client_that_does_not_finish_its_form_is_answered(
    locked: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a wrong password."""
    monkeypatch.setattr(pages, "FORM_S", 0.3)
    host, _, port = locked.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30\r\n\r\npass")
        assert slow.recv(65_536).startswith(b"HTTP/1.1 401 ")


def test_redis_that_hangs_is_asked_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that waited ten seconds in vain cost Redis nothing, so no long rest follows."""
    monkeypatch.setattr(watcher, "REST", 1e6)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        redis = RedisSettings(url=f"redis://127.0.0.1:{silent.getsockname()[1]}", timeout_s=2.0)
        with board(redis, look_first=False) as found:
            eventually("a second look", lambda: found.watcher.last.number > 1)


def test_clients_are_bounded(connection: Connection) -> None:
    """One more is told so, and listens once another has left."""
    with board(connection.settings, interval_s=0.05) as where:
        api = where.dashboard.api
        api.most_streams = 2
        for _ in range(2):
            Listener(where)
        eventually("both listen", lambda: len(where.dashboard.hub) == 2)
        answer = where.get("/api/v1/events")
        assert (answer.status_code, answer.json()["error"]["about"]) == (503, "clients")


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    file.chmod(0o600)
    return file


def test_command_serves_until_it_is_stopped(redis_url: str, tmp_path: Path) -> None:
    """It says where; a SIGTERM ends it within seconds although a client listens."""
    log = tmp_path / "log"
    with running(log, "dashboard", "--redis", redis_url, "--port", "0", "--interval", "1s") as process:
        line = eventually("its address", lambda: (text := log.read_text()).endswith("\n") and text)
        address = line.split()[-1]
        assert address.startswith("http://127.0.0.1:")
        client = Listener(Board(address))
        eventually("a look", lambda: client.of("look"))
        began = time.monotonic()
        assert terminate(process) == 0
        assert time.monotonic() - began < 10
        assert client.ended(10.0)
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("options", "about", "code"),
    [
        (("--host", "0.0.0.0"), "needs a password", 2),  # noqa: S104  # it is refused
        (("--password-file", "/none"), "cannot read the password file", 2),
        (("--port", "70000"), "port must be a whole number", 2),
        (("--host", "203.0.113.7", "--password-file", "FILE"), "cannot listen on 203.0.113.7", 2),
        (("--tls-key", "x.pem"), "tls_key needs tls_certificate", 2),
        (("--tls-certificate", "/none.pem"), "cannot read /none.pem", 2),
        (("--tls-certificate", "FILE"), "cannot be used", 2),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    redis_url: str, password_file: Path, options: tuple[str, ...], about: str, code: int
) -> None:
    """And an exit code; nothing listens then."""
    words = [str(password_file) if word == "FILE" else word for word in options]
    done = fedmoe_here("dashboard", "--redis", redis_url, "--port", "0", *words)
    assert done.returncode == code, done.stderr
    assert about in done.stderr
    assert done.stderr.count("\n") == 1
    assert PASSWORD not in done.stderr


def test_port_that_is_taken_is_one_sentence(redis_url: str) -> None:
    """With what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = fedmoe_here("dashboard", "--redis", redis_url, "--port", port)
    assert done.returncode == 2
    assert "choose another --port or --host" in done.stderr


def test_login_that_redis_refuses_ends_it(server: EmbeddedRedis) -> None:
    """As with every command: a person must repair it."""
    done = fedmoe_here("dashboard", "--redis", f"unix://nobody:wrong@{server.socket}", "--port", "0")
    assert done.returncode == 2
    assert "refuses the login" in done.stderr
    assert "wrong@" not in done.stderr
    assert os.linesep * 2 not in done.stderr
