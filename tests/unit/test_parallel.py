"""Rows encoded in several processes: as in one, and no process is left behind."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from fedmoe.data import parallel
from fedmoe.data.bad_rows import BadRows, Problem
from fedmoe.data.encode import Encoded
from fedmoe.data.examples import make_examples
from fedmoe.data.jsonl import open_data
from fedmoe.data.parallel import Job, encode_rows, n_processes
from fedmoe.data.records import records
from fedmoe.errors import StoppedError
from tests.processes import eventually
from tests.tiny import tiny_tokenizer

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]  # each process imports transformers
N_ROWS = 400


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Rows of different length, every seventh without an answer, every eleventh broken."""
    rows = [
        json.dumps({"prompt": f"q{n}" * (n % 50), "completion": "a" * (n % 7)}) if n % 11 else "{"
        for n in range(1, N_ROWS + 1)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "CHUNK_CHARS", 500)


def encoded(
    path: Path,
    *,
    processes: int,
    tokenizer: PreTrainedTokenizerFast | None = None,
    stopped: Callable[[], bool] = lambda: False,
    at_first: Callable[[], object] = lambda: None,
) -> list[Encoded | Problem]:
    job = Job(path=path, tokenizer=tokenizer or tiny_tokenizer(), max_length=64, learn="all")
    made: list[Encoded | Problem] = []
    with closing(encode_rows(records(path), job, processes=processes, stopped=stopped)) as rows:
        for row in rows:
            made.append(row)
            if len(made) == 1:
                at_first()
    return made


others: set[psutil.Process] = set()  # children of tests that ran before, which nobody waited for


@pytest.fixture(autouse=True)
def _children_of_others() -> None:
    others.clear()
    others.update(children())


def children() -> list[psutil.Process]:
    """The processes that were started since the test began, dead ones that nobody waited for among them."""
    return [child for child in psutil.Process().children() if child not in others]


def test_several_processes_make_what_one_makes(path: Path) -> None:
    """Row for row, in the order of the file, bad rows too; then they are gone."""
    seen: list[psutil.Process] = []
    made = encoded(path, processes=2, at_first=lambda: seen.extend(children()))
    assert made == encoded(path, processes=0)
    assert (len(made), len(seen), children()) == (N_ROWS, 2, [])


def test_what_a_killed_process_had_is_encoded_here(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Killed for its memory, say; with none left, all the rest."""

    def kill() -> None:
        for child in children():
            child.kill()

    assert encoded(path, processes=2, at_first=kill) == encoded(path, processes=0)
    assert "has died (out of memory?)" in caplog.text
    assert children() == []


def test_whoever_is_told_to_stop_leaves_no_process(path: Path) -> None:
    """While they still start, and while rows are under way."""
    with pytest.raises(StoppedError):
        encoded(path, processes=2, stopped=lambda: True)
    assert children() == []
    stop: list[None] = []
    with pytest.raises(StoppedError):
        encoded(path, processes=2, stopped=lambda: bool(stop), at_first=lambda: stop.append(None))
    assert children() == []


def test_processes_end_with_a_killed_parent(path: Path) -> None:
    """By the end of their pipe; signals they leave to their parent."""
    program = (
        "import sys; from pathlib import Path; from tests.unit.test_parallel import encoded, children\n"
        "encoded(Path(sys.argv[1]), processes=2, at_first=lambda: (print(*[c.pid for c in children()], flush=True),"
        " sys.stdin.read()))"
    )
    command = [sys.executable, "-c", program, str(path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as parent:
        assert parent.stdout
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        for pid in pids:
            psutil.Process(pid).terminate()
            assert psutil.pid_exists(pid)
        parent.kill()
    eventually("both have ended", lambda: not any(map(_is_alive, pids)))


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_tokenizer_that_cannot_travel_is_used_here(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Such as one whose code came from a hub."""
    tokenizer = tiny_tokenizer()
    tokenizer.local = lambda: None  # a function without a name cannot be handed over
    assert encoded(path, processes=2, tokenizer=tokenizer) == encoded(path, processes=0)
    assert "cannot run in other processes" in caplog.text


@pytest.mark.parametrize("possible", [0, 1])
def test_fewer_processes_do_as_well(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, possible: int
) -> None:
    """Where a limit forbids more of them, or any."""
    left = [None] * possible
    start = subprocess.Popen

    def limited(*args: Any, **options: Any) -> "subprocess.Popen[bytes]":
        if not left:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        left.pop()
        return start(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", limited)
    assert encoded(path, processes=2) == encoded(path, processes=0)
    assert f"only {possible} of 2 processes for tokenizing" in caplog.text
    assert children() == []


def test_a_large_file_is_encoded_on_all_cores(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a small one here, since a process takes seconds to start; the examples are the same."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    assert (n_processes(2**30), n_processes(2**20)) == (2, 0)
    bad_rows = BadRows(report=print)
    data = open_data(path, bad_rows)
    small = make_examples(data, tiny_tokenizer(), 64, bad_rows)
    monkeypatch.setattr(parallel, "WORTH_BYTES", 1)
    assert make_examples(data, tiny_tokenizer(), 64, bad_rows) == small
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})
    assert n_processes(2**30) == 0
