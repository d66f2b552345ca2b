"""The command line: quick help, configuration file, environment, precedence."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedmoe.cli.main import COMMANDS, cli
from fedmoe.errors import RedisUnavailableError, SettingsError
from fedmoe.util.log import JsonFormatter, TextFormatter
from tests.errors import raises


def test_help_imports_nothing_heavy() -> None:
    """`fedmoe --help` must answer at once: neither torch nor redis nor transformers is imported."""
    code = "import sys, fedmoe.cli.main as m; m.cli.main(['--help'], standalone_mode=False); "
    code += "print([n for n in ('torch', 'redis', 'transformers', 'peft', 'rich') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    """Each listed command can be imported and explains itself."""
    done = CliRunner().invoke(cli, [name, "--help"])
    assert done.exit_code == 0, done.output
    assert "Usage:" in done.output


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("reddis = 'x'", "reddis"),
        ("[agregator.run]\nrank = 4", "agregator"),
        ("[aggregator.run]\nrnk = 4", "rnk"),
        ("[aggregator", "TOML"),
        ("[aggregator.walk]\nrank = 4", "walk"),
    ],
)
def test_mistakes_in_the_configuration_are_named(tmp_path: Path, text: str, about: str) -> None:
    """Click ignores unknown keys silently; FedMoE does not."""
    file = tmp_path / "fedmoe.toml"
    file.write_text(text)
    with raises(SettingsError, about=about):
        CliRunner().invoke(cli, ["--config", str(file), "aggregator", "run"], catch_exceptions=False)


def test_missing_configuration_is_named(tmp_path: Path) -> None:
    """A file that is not there."""
    with raises(SettingsError, about="config", cause=FileNotFoundError):
        CliRunner().invoke(cli, ["--config", str(tmp_path / "none.toml"), "status"], catch_exceptions=False)


def test_command_line_wins_over_environment_over_file(tmp_path: Path) -> None:
    """The three sources of a setting, seen by what --redis is refused for."""
    file = tmp_path / "fedmoe.toml"
    file.write_text("redis = 'file://x'\n[aggregator.run]\nrank = 4\n")
    command = ["--config", str(file), "aggregator", "run"]
    for arguments, environment, expected in (
        ([], {}, "file://x"),
        ([], {"FEDMOE_REDIS": "env://x"}, "env://x"),
        (["--redis", "line://x"], {"FEDMOE_REDIS": "env://x"}, "line://x"),
    ):
        with pytest.raises(SettingsError, match=expected):
            CliRunner(env=environment).invoke(cli, command + arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    "url", ["redis://:s3c#ret@127.0.0.1:1", "redis://:s3c/ret@127.0.0.1:1", "redis://u:s3c@ret@127.0.0.1:x"]
)
def test_password_is_never_shown(url: str) -> None:
    """Not even when it makes the URL unreadable; the message says how to write it."""
    with pytest.raises((SettingsError, RedisUnavailableError)) as error:
        CliRunner().invoke(cli, ["status", "--redis", url], catch_exceptions=False)
    assert "s3c" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "about"),
    [
        ("redis://h?x=y", "option"), ("redis://h?decode_responses=true", "option"), ("redis://[::1", "url"),
        ("http://h", "scheme"),
    ],
)  # fmt: skip
def test_url_that_cannot_work_is_refused(url: str, about: str) -> None:
    """One sentence, whatever redis-py would make of it."""
    with raises(SettingsError, about=about):
        CliRunner().invoke(cli, ["status", "--redis", url], catch_exceptions=False)


def test_control_characters_never_reach_the_terminal() -> None:
    """What a worker wrote is logged escaped."""
    record = logging.LogRecord("n", logging.WARNING, "f", 1, "took %s", ("\x1b[31mevil\a",), None)
    assert TextFormatter().format(record).endswith("WARNING took \\x1b[31mevil\\x07")


def test_a_log_line_tells_when_and_how_grave() -> None:
    """UTC as ISO 8601, the level, the message, whatever the time zone here is."""
    record = logging.LogRecord("n", logging.INFO, "f", 1, "served", (), None)
    record.created = 1769860800.9
    assert TextFormatter().format(record) == "2026-01-31T12:00:00Z INFO served"
    record.threadName = "sync gateway"  # a worker may train two experts
    assert TextFormatter().format(record) == "2026-01-31T12:00:00Z INFO gateway: served"


def test_a_missing_option_is_named() -> None:
    """Not as an error of the class that it is a setting of."""
    done = CliRunner().invoke(cli, ["worker", "run", "--stream", "x"])
    assert done.exit_code == 2
    assert "Missing option '--data'" in done.output


@pytest.mark.parametrize(
    "text",
    [
        "redis://ann:pass@h:1/0 is away",
        "at rediss://:p/a?s#s@h",
        "x?sentinel_password=pass&db=0",
        "api_key=pass",
    ],
)
def test_a_log_line_masks_what_may_be_a_password(text: str) -> None:
    """Also in what a library says, or a traceback quotes."""
    record = logging.LogRecord("n", logging.WARNING, "f", 1, "%s", (text,), None)
    shown = TextFormatter().format(record), json.loads(JsonFormatter().format(record))["message"]
    assert not [one for one in shown if "pass" in one.replace("password=", "") or "p/a" in one]
    assert all("***" in one for one in shown)


def test_a_traceback_is_one_line_of_json_and_escaped() -> None:
    """What others wrote may be in an exception's message."""
    try:
        raise ValueError("\x1b[31mevil")
    except ValueError as error:
        failed = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("n", logging.ERROR, "f", 1, "failed", (), failed)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    said = json.loads(line)
    assert (said["time"][-1], said["level"], said["message"]) == ("Z", "error", "failed")
    for text in (said["exception"], TextFormatter().format(record)):
        assert "Traceback" in text
        assert "\\x1b[31mevil" in text
        assert "\x1b" not in text
