"""`fedmoe status` as a command: columns, JSON, exit codes, and nothing on the screen that others wrote there."""

import io
import json
import re
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from consumers.compaction import compact
from fedmoe.cli.status import render
from fedmoe.cli.status import screen as status_screen
from fedmoe.protocol.federation import duration
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.reading import printable
from fedmoe.store.worker import WorkerStore
from tests.federation import ScriptedWorker, make_expert, serve, small_spec
from tests.looking import BEAT, build_gateway, look
from tests.processes import environment, fedmoe

pytestmark = pytest.mark.one_server


def test_junk_of_others_is_shown_escaped(connection: Connection) -> None:
    """Terminal escapes, markup, bytes that are no text and endless texts change nothing on the screen."""
    make_expert(connection)
    client = connection.client
    key = b"fedmoe:{sql_expert}:worker:\x1b[2J\xff[red]\xe2\x80\xae"
    client.hset(
        key, mapping={"host": b"\x9b31m\x1b]0;owned\x07" + b"x" * 5000, "step": "1e400", "loss": "nan"}
    )
    client.xadd("fedmoe:{sql_expert}:dead", {"reason": "\x1b[31mred\nline"})
    seen = look(connection)
    (worker,) = seen.workers
    assert worker.name == "\\x1b[2J\\xff[red]\\u202e"
    assert worker.host.startswith("\\x9b31m\\x1b]0;owned\\x07xxx")
    assert len(worker.host) == 64 + len("...")
    assert (worker.step, worker.loss, worker.last_seen_s) == (None, None, None)
    for arguments in ((), ("--json",)):
        done = fedmoe("status", "--redis", connection.settings.url, *arguments)
        assert done.returncode == 0, done.stderr
        assert not set(done.stdout) & {"\x1b", "\x07", "\x9b", "\u202e"}
        assert "[red]" in done.stdout
    screen = io.StringIO()
    Console(file=screen, width=250, color_system=None).print(render(seen, 250))
    assert worker.name in screen.getvalue()
    assert worker.host in screen.getvalue()
    narrow = [len(line) for line, _ in status_screen(seen, width=130) if not line.startswith("!")]
    assert 80 < max(narrow) <= 130


@pytest.mark.parametrize("raw", [b"\xff\x00", "\x1b[0m", "\ud800", "\u2028", "a" * 10_000])
def test_printable_is_printable(raw: bytes | str) -> None:
    """Also of lone surrogates and line separators."""
    assert printable(raw).isprintable()
    assert len(printable(raw)) < 400


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (200_000, "2 days")],
)
def test_durations_are_short(seconds: float | None, text: str) -> None:
    """In the largest unit of which there are two."""
    assert duration(seconds) == text


def test_the_command_prints_columns_json_and_the_gateway(connection: Connection) -> None:
    """Columns when it is no terminal; JSON without nan; both with exit code 0."""
    expert = make_expert(connection)
    url = connection.settings.url
    assert "there are no experts yet" in fedmoe("status", "--redis", url, "--prefix", "other").stdout
    assert json.loads(fedmoe("status", "--redis", url, "--json").stdout)["experts"][0]["meta"]["loss"] is None
    ScriptedWorker(connection, small_spec()).push(0.5)
    serve(expert)
    WorkerStore(connection, "sql_expert", "alice").beat(BEAT, ttl_s=15)
    build_gateway(connection)
    text = fedmoe("status", "--redis", url).stdout
    head, row = (
        re.split(r"  +", line) for line in text.splitlines() if line.startswith(("expert ", "sql_expert "))
    )
    assert re.fullmatch(r"\d+ s", row.pop(head.index("last update")))
    head.remove("last update")
    assert dict(zip(head, row, strict=False)) == {
        "expert": "sql_expert", "version": "1", "waiting": "0", "pending": "0", "workers": "1", "loss": "1.500",
        "staleness": "0.00", "applied": "1", "refused": "0", "served by": "nobody",
    }  # fmt: skip
    worker = next(line.split() for line in text.splitlines() if line.startswith("alice "))
    assert " ".join(worker[:3] + worker[4:]) == "alice sql_expert lab s 12 1.250 310 1 0 0 3 1"
    assert "merged gateway: cat, rank 2, built from sql_expert v1" in text
    shown = json.loads(fedmoe("status", "--redis", url, "--json").stdout)
    assert shown["experts"][0]["workers"][0]["loss"] == 1.25
    assert shown["experts"][0]["mean_staleness"] == 0
    assert shown["findings"] == ["sql_expert: no aggregator serves it: start `fedmoe aggregator run`"]


def test_it_says_that_the_key_with_the_weights_lags(connection: Connection) -> None:
    """As long as there is a tail: who reads the key by hand gets an earlier version."""
    url, spec = connection.settings.url, small_spec(wire_format="int4")
    expert = make_expert(connection, spec=spec)
    ScriptedWorker(connection, spec).push(0.5)
    serve(expert)
    lags = "sql_expert: the key `weights` is of version 0, the updates since then are in its tail"
    assert lags in fedmoe("status", "--redis", url).stdout.splitlines()
    compact(expert)
    assert "tail" not in fedmoe("status", "--redis", url).stdout


def test_a_redis_that_does_not_answer_is_one_sentence() -> None:
    """Exit code 1, no traceback, and the password stays secret."""
    done = fedmoe("status", "--redis", "redis://me:secret@127.0.0.1:1/0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "cannot be reached" in done.stderr
    assert "secret" not in done.stderr


def test_watch_outlives_an_outage_and_ends_quietly(server: EmbeddedRedis) -> None:
    """A JSON line each time; an outage is a sentence on stderr; Ctrl-C is the way out, with exit code 0."""
    with EmbeddedRedis(server=server.server) as own:
        make_expert(Connection(RedisSettings(url=own.url)))
        with subprocess.Popen(
            [sys.executable, "-m", "fedmoe.cli.main", "status", "--redis", own.url, "--json", "--watch", "0.1"],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stderr is not None
            assert json.loads(process.stdout.readline())["experts"]
            own.kill()
            assert "cannot be reached" in process.stderr.readline()
            own.start()
            while not json.loads(process.stdout.readline())["experts"]:
                pass
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
            assert "Traceback" not in process.stderr.read()


def test_status_imports_no_torch() -> None:
    """It must be quick, also over ssh on a small machine."""
    code = "import sys, fedmoe.cli.status, fedmoe.store.inspect; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_where_no_expert_is_shown_it_says_where_to_look(server: EmbeddedRedis) -> None:
    """In another database of the same server, and at a replica before and after it has synchronised."""
    with EmbeddedRedis(server=server.server) as own, EmbeddedRedis(server=server.server) as copy:
        master, replica = (Connection(RedisSettings(url=one.url)) for one in (own, copy))
        replica.client.replicaof("127.0.0.1", "1")  # a master that does not answer

        def told(url: str) -> str:
            (finding,) = json.loads(fedmoe("status", "--redis", url, "--json").stdout)["findings"]
            return str(finding)

        assert told(replica.settings.url) == (
            "there are no experts here, but this is a replica that has not synchronised with its master yet: use the "
            "URL of the master"
        )
        replica.client.replicaof("NO", "ONE")
        assert told(master.settings.url) == "there are no experts yet: start `fedmoe aggregator run`"
        make_expert(master)
        other = f"{own.url}?db=1"
        assert told(other) == (
            "there are no experts: database 1 of this server is empty, keys are in database 0: correct the database "
            "in the URL, or start `fedmoe aggregator run`"
        )
        master.close()
        replica.close()
