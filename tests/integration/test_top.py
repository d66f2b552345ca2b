"""`fedmoe top` in a real terminal: keys, sizes, an outage, and a clean terminal however it ends."""

import signal
import sys
from pathlib import Path

import pytest

from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.worker import WorkerStore
from tests.federation import make_expert
from tests.looking import BEAT, hold
from tests.processes import eventually, fedmoe_here, is_stopped
from tests.screen import Typed, typing

pytestmark = pytest.mark.one_server

TOP = [sys.executable, "-m", "fedmoe.cli.main", "top", "--interval", "0.2s", "--redis"]
UP, DOWN, LEFT, RIGHT, PAGE_DOWN, HOME, END = (
    "\x1b[A",
    "\x1b[B",
    "\x1b[D",
    "\x1b[C",
    "\x1b[6~",
    "\x1b[H",
    "\x1b[F",
)


def fill(connection: Connection) -> None:
    """Two experts, 60 workers of one of them and a hostile one, and a refusal."""
    make_expert(connection)
    make_expert(connection, "docs_expert")
    hold(connection)
    for n in range(60):
        WorkerStore(connection, "sql_expert", f"worker-{n:02}").beat(BEAT, ttl_s=3600)
    connection.client.hset(
        b"fedmoe:{docs_expert}:worker:\x1b[2Jevil\xe2\x80\xae\x07", mapping={"step": "900"}
    )
    connection.client.xadd(
        "fedmoe:{docs_expert}:dead", {"reason": "\x1b]0;owned\x07 too long", "worker": "eve"}
    )


def test_keys_and_sizes(connection: Connection) -> None:
    """Panes, scrolling, sorting, filtering and resizing, with the rows that follow."""
    fill(connection)
    with typing([*TOP, connection.settings.url], columns=150, lines=20) as top:
        text = top.shows("sql_expert", "docs_expert", "[1 experts]", "experts 2  workers 61", "1-2 of 2")
        assert text.count("\n") == 19
        top.type("\t")
        top.shows("[2 workers]", "\\x1b[2Jevil\\u202e\\x07", "worker-14", "1-16 of 61")
        top.type(PAGE_DOWN + DOWN)
        top.shows("worker-16", "worker-31", "18-33 of 61")
        top.type(END)
        top.shows("worker-59", "46-61 of 61")
        top.type(HOME + "/" + "er-4")
        top.shows("filter: er-4_", "worker-40", "worker-49", "1-10 of 10")
        top.type("\r")
        top.shows("filter: er-4 ")
        top.type("\x1b")
        top.shows("1-16 of 61")
        top.type(RIGHT * 5 + "r")
        assert "evil" in top.shows("sorted by step (falling)").splitlines()[3]
        top.resize(60, 10)
        small = top.shows("1-6 of 61")
        assert small.count("\n") == 9
        assert max(map(len, small.splitlines())) <= 60
        assert "lab" not in small  # the column of hosts is the first to go
        top.resize(150, 20)
        top.shows("1-16 of 61")
        top.type("3")
        top.shows("[3 refusals]", "eve", "\\x1b]0;owned\\x07 too long")
        top.type("5")
        top.shows("docs_expert: no aggregator serves it")
        top.type("?")
        top.shows("any key goes back")
        top.type("1q")
        assert top.end() == 0
        assert top.screen.normal == [""]


def typed_q(top: Typed) -> None:
    top.type("q")


def typed_ctrl_c(top: Typed) -> None:
    top.type("\x03")


def sent(number: signal.Signals) -> object:
    return lambda top: top.process.send_signal(number)


@pytest.mark.parametrize(
    "end",
    [typed_q, typed_ctrl_c, sent(signal.SIGTERM), sent(signal.SIGHUP), sent(signal.SIGQUIT)],
    ids=["q", "Ctrl-C", "SIGTERM", "SIGHUP", "Ctrl-\\"],
)
def test_the_terminal_is_clean_afterwards(connection: Connection, end: object) -> None:
    """Screen, cursor and typing are as before, and nothing is left on the screen."""
    make_expert(connection)
    with typing([*TOP, connection.settings.url]) as top:
        top.shows("sql_expert")
        assert top.screen.is_alternate
        assert callable(end)
        end(top)
        assert top.end() == 0
        assert top.screen.normal == [""]


def test_the_terminal_is_clean_after_a_bug(connection: Connection) -> None:
    """The traceback is on the normal screen."""
    make_expert(connection)
    code = (
        "import sys; from fedmoe.cli import top_view; from fedmoe.cli.main import main; sys.argv[0] = 'fedmoe'\n"
        "top_view.View._foot = lambda *_: 1 / 0 if _[1] else ''; main()"
    )
    with typing([sys.executable, "-c", code, "top", "--redis", connection.settings.url]) as top:
        assert top.end() == 1
        assert "ZeroDivisionError" in top.screen.text


def test_ctrl_z_gives_the_terminal_back_meanwhile(connection: Connection) -> None:
    """The shell has it until `fg`; then the screen is there again."""
    make_expert(connection)
    script = 'set -m; "$@"; echo "back in the shell"; read -r line; fg'
    with typing(["bash", "--norc", "-c", script, "bash", *TOP, connection.settings.url]) as top:
        top.shows("sql_expert")
        top.type("\x1a")
        top.shows("back in the shell")
        assert not top.screen.is_alternate
        assert top.screen.has_cursor
        top.type("\n")
        top.shows("sql_expert", "[1 experts]")
        assert top.screen.is_alternate
        top.type("q")
        assert top.end() == 0


def test_keys_work_while_redis_is_away(server: EmbeddedRedis) -> None:
    """The last state stays, with its age and the reason; nothing is typed in vain; a password stays secret."""
    with EmbeddedRedis(server=server.server) as own:
        make_expert(Connection(RedisSettings(url=own.url)))
        url = own.url.replace("unix://", "unix://default:secret@")
        with typing([*TOP, url], columns=200) as top:
            top.shows("sql_expert")
            own.process.send_signal(signal.SIGSTOP)
            eventually("frozen", lambda: is_stopped(own.process))
            top.type("2")
            top.shows("[2 workers]")
            own.process.send_signal(signal.SIGCONT)
            own.kill()
            text = top.shows("the state of ", " ago, because Redis at ")
            assert "secret" not in text
            top.type("1")
            top.shows("[1 experts]", "sql_expert")
            own.start()
            top.hides("because")
            top.type("q")
            assert top.end() == 0


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_without_a_terminal_it_says_what_to_use(
    term: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One sentence, exit code 2; also if the terminal cannot move its cursor."""
    monkeypatch.setenv("TERM", term)
    done = fedmoe_here("top")
    assert done.returncode == 2
    assert "fedmoe status" in done.stderr
    if term == "dumb":
        with typing([*TOP, "redis://127.0.0.1:1"], TERM="dumb") as top:
            assert top.end() == 2
