"""A worker whose disk fails: it trains on, beats on and says so; nothing is published that is not on disk."""

import errno
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from consumers.expert import Expert
from fedmoe.errors import SettingsError
from fedmoe.store.connection import Connection
from producers import checkpoint, heartbeat, saver, sync
from producers.checkpoint import StateDir
from tests.errors import raises
from tests.federation import make_expert, serving
from tests.integration.test_sync import RULES, SPEC, Run
from tests.processes import eventually

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]


@pytest.fixture
def expert(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> Expert:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_INTERVAL_S", 0.1)
    monkeypatch.setattr(saver, "RETRY_S", 0.2)
    monkeypatch.setattr(sync, "RETRY_S", 0.2)
    return make_expert(connection, spec=SPEC, rules=RULES)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here ({done.stderr.strip()})")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


class Trial:
    """A worker that trains on in a thread while its disk fails and is mended."""

    def __init__(self, expert: Expert, connect: Connect, state: StateDir) -> None:
        self.expert = expert
        self.connect = connect
        self.run = Run(connect(), state)
        self._enough = threading.Event()
        self._training = threading.Thread(target=self._train)
        self._training.start()

    def _train(self) -> None:
        while not self._enough.is_set():
            self.run.train(1)

    def beat(self) -> dict[bytes, bytes]:
        key = self.expert.store.keys.worker("alice")
        found: dict[bytes, bytes] = self.expert.store.connection.client.hgetall(key)
        return found

    def expect_life(self, problem: str) -> None:
        """The problem is told, the heartbeat beats, the training trains; and no update is published."""
        eventually("the problem in the status", lambda: problem in self.run.sync.status.problem)
        eventually(
            "the problem in the heartbeat", lambda: problem in self.beat().get(b"problem", b"").decode()
        )
        beat, steps, published = self.beat()[b"beat"], self.run.steps, self.run.sync.status.published
        eventually("further heartbeats", lambda: int(self.beat()[b"beat"]) > int(beat) + 3)
        eventually("further steps", lambda: self.run.steps > steps + 20)
        assert self.run.thread.is_alive()
        assert self.run.sync.status.published <= published + 1  # one may have been on its way

    def expect_recovery(self) -> None:
        """What was trained meanwhile arrives, once, and the problem is over."""
        eventually("the end of the problem", lambda: "checkpoint" not in self.run.sync.status.problem)
        eventually(
            "no problem in the heartbeat", lambda: b"checkpoint" not in self.beat().get(b"problem", b"")
        )
        self.finish()
        assert self.run.sync.failure is None
        assert self.expert.store.load().meta.n_examples == self.run.steps

    def finish(self, drain_s: float = 15.0) -> None:
        self._enough.set()
        self._training.join()
        self.run.finish(drain_s)


@pytest.fixture
def trial(expert: Expert, connect: Connect) -> Iterator[Callable[[StateDir], Trial]]:
    """Start a worker beside an aggregator; it has published something when this returns."""
    made: list[Trial] = []

    def start(state: StateDir) -> Trial:
        made.append(Trial(expert, connect, state))
        eventually("an update", lambda: made[0].run.sync.status.applied >= 1)
        return made[0]

    with serving(connect(), block_ms=20):
        yield start
        for one in made:
            one.finish(0.0)


Start = Callable[[StateDir], Trial]


def test_full_disk(small_disk: Path, trial: Start) -> None:
    """A real file system without room: life goes on; once there is room again, so does publishing."""
    worker = trial(StateDir(small_disk / "state"))
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as out, suppress(OSError):
        while out.write(b"x" * 4096):
            pass
    worker.expect_life("No space left on device")
    assert list((small_disk / "state").glob("*.safetensors"))  # the checkpoint before
    filler.unlink()
    worker.expect_recovery()


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        (checkpoint, "save_file", errno.EDQUOT),
        (checkpoint, "to_disk", errno.EIO),
        (checkpoint.Path, "replace", errno.EROFS),
        (checkpoint.Path, "stat", errno.ESTALE),
    ],
)
def test_each_step_of_a_checkpoint_may_fail(
    tmp_path: Path, trial: Start, monkeypatch: pytest.MonkeyPatch, module: object, name: str, number: int
) -> None:
    worker = trial(StateDir(tmp_path / "state"))

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(module, name, fail)
        worker.expect_life(os.strerror(number))
    worker.expect_recovery()


def test_directory_that_is_gone_and_cannot_be_made(tmp_path: Path, trial: Start) -> None:
    """A file of its name is in the way, then it is not; the directory is held as before."""
    state = StateDir(tmp_path / "state")
    worker = trial(state)
    state.path.rename(tmp_path / "gone")
    state.path.write_text("in the way")
    worker.expect_life("File exists")
    state.path.unlink()
    eventually("the checkpoint", state.file.exists)
    with raises(SettingsError, about="lock"):
        StateDir(state.path)
    assert (state.path / "id").read_text().startswith(state.id)
    worker.expect_recovery()


def test_directory_that_another_worker_has_taken_meanwhile(tmp_path: Path, trial: Start) -> None:
    """It was removed, and somebody started a worker on it before the next checkpoint: nobody's is overwritten."""
    state = StateDir(tmp_path / "state")
    worker = trial(state)
    state.path.rename(tmp_path / "gone")
    other = StateDir(tmp_path / "other")
    other.path.rename(state.path)
    worker.expect_life("another worker")
    assert not state.file.exists()
    other.close()
    worker.expect_recovery()


def test_disk_that_does_not_answer(tmp_path: Path, trial: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that hangs, as on a file server that is gone: the worker beats on, and can be stopped."""
    monkeypatch.setattr(saver, "SLOW_S", 0.2)
    monkeypatch.setattr(saver, "LOOK_S", 0.05)
    worker = trial(StateDir(tmp_path / "state"))
    answers = threading.Event()
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "to_disk", lambda _: answers.wait())
        worker.expect_life("the write has not ended after")
    answers.set()
    worker.expect_recovery()
