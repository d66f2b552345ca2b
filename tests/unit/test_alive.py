"""The alive file, and the levels of the journal."""

import logging
import os
import time
from pathlib import Path

import pytest

from fedmoe.errors import FedMoEError, NotAliveError, SettingsError
from fedmoe.util import alive as module
from fedmoe.util.alive import LATE_S, alive, look
from fedmoe.util.journal import is_journal, marked, priority_of
from tests.errors import raises
from tests.processes import eventually


def test_a_process_is_alive_as_long_as_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes again and again, and removes the file when it ends."""
    monkeypatch.setattr(module, "BEAT_S", 0.01)
    file = tmp_path / "alive"
    with alive(file, "worker"):
        assert look(file, now_s=time.monotonic()).startswith(f"the worker (pid {os.getpid()}) is alive")
        file.unlink()
        eventually("it is written again", file.exists)
    assert os.listdir(tmp_path) == []


def test_what_was_just_written_is_never_in_the_future(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rounded time would be, and would look like one from before the machine was started again."""
    monkeypatch.setattr(module.time, "monotonic", lambda: 1000.99)
    with alive(tmp_path / "alive", "worker"):
        assert "alive" in look(tmp_path / "alive", now_s=1000.99)


def test_one_that_is_silent_is_not(tmp_path: Path) -> None:
    """Silent for too long, and a file of before the machine was started again."""
    file = tmp_path / "alive"
    file.write_text("aggregator 7 1000.0\n")
    assert "pid 7" in look(file, now_s=1000.0 + LATE_S)
    for now_s in (1000.1 + LATE_S, 999.0):
        with raises(NotAliveError, about="alive_file"):
            look(file, now_s=now_s)
    with raises(NotAliveError, about="alive_file", cause=FileNotFoundError):
        look(tmp_path / "none", now_s=0.0)


@pytest.mark.parametrize(
    "content", [b"", b"worker 7", b"\x1b[2J 7 1.0", b"worker x 1.0", b"worker 7 x", b"\xff" * 9]
)
def test_another_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    """Whatever is in it, also what would control a terminal."""
    file = tmp_path / "alive"
    file.write_bytes(content)
    with pytest.raises(FedMoEError) as caught:
        look(file, now_s=0.0)
    assert isinstance(caught.value, SettingsError)
    assert "\x1b" not in str(caught.value)


def test_a_file_that_cannot_be_written_fails_at_the_start(tmp_path: Path) -> None:
    """Else the first health check would say that the process is dead."""
    with (
        raises(SettingsError, about="alive_file", cause=FileNotFoundError),
        alive(tmp_path / "no" / "file", "worker"),
    ):
        pytest.fail("it began")


@pytest.mark.parametrize(
    ("level", "mark"), [("DEBUG", 7), ("INFO", 6), ("WARNING", 4), ("ERROR", 3), ("CRITICAL", 2)]
)
def test_each_line_for_the_journal_has_its_level(level: str, mark: int) -> None:
    """Also the second line of a message, which the journal stores by itself."""
    text = marked("one\ntwo", priority_of(getattr(logging, level)))
    assert text == f"<{mark}>one\n<{mark}>two"


def test_the_journal_is_the_stream_that_systemd_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file to which stderr was redirected, in a service, is not the journal."""
    with (tmp_path / "a").open("w") as ours, (tmp_path / "b").open("w") as other:
        assert not is_journal(ours.fileno())
        found = os.fstat(ours.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        assert is_journal(ours.fileno())
        assert not is_journal(other.fileno())
