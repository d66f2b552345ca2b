"""Whose name it is: a heartbeat that beats is believed, unless it is provably this worker's predecessor's."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmoe.errors import NameTakenError
from fedmoe.protocol.beat import Beat
from fedmoe.store.connection import Connection
from fedmoe.store.worker import WorkerStore
from producers.checkpoint import StateDir
from producers.claim import JOIN_TTL_S, claim_name

pytestmark = pytest.mark.one_server

PATIENCE_S = 7.5


class Watch:
    """Stands for the stop event and the clock of whoever claims: each look takes a second, then something happens."""

    def __init__(self, then: Callable[[int], object] = lambda _: None) -> None:
        self.seconds = 0
        self._then = then

    def wait(self, timeout: float) -> bool:
        self.seconds += 1
        self._then(self.seconds)
        return False

    def claim(self, store: WorkerStore, state_id: str = "") -> int:
        """Claim the name; returns the seconds that it took."""
        claim_name(
            store, state_id=state_id, patience_s=PATIENCE_S, stop=self, clock=lambda: float(self.seconds)
        )  # fmt: skip
        return self.seconds


@pytest.fixture
def store(connection: Connection) -> WorkerStore:
    return WorkerStore(connection, "sql_expert", "alice")


def beat(store: WorkerStore, number: int, *, state_id: str = "", run: str = "1-00000001") -> None:
    """A heartbeat of a process that seems to be this very one: the same host name and process id."""
    said = Beat(
        run=run, beat=str(number), state_id=state_id, host=socket.gethostname(), pid=os.getpid(), since=1769860800
    )  # fmt: skip
    store.beat(said, ttl_s=600)


def test_living_worker_of_the_same_host_name_and_process_id_keeps_its_name(store: WorkerStore) -> None:
    """Two containers: each is process 1 of a host of one name; the sentence says who has the name and what to do."""
    beat(store, 1)
    with pytest.raises(NameTakenError) as taken:
        Watch(lambda second: beat(store, 1 + second)).claim(store)
    assert str(taken.value) == (
        f"the name 'alice' is taken: a worker of expert 'sql_expert' with this name is running (pid {os.getpid()} on "
        f"host {socket.gethostname()}, started 2026-01-31T12:00:00Z); stop that one, or start this one with another "
        "--name"
    )


def test_state_directory_proves_the_predecessor(store: WorkerStore, tmp_path: Path) -> None:
    """Killed and started again on its directory: the name is free at once, whatever host and process id."""
    first = StateDir(tmp_path)
    beat(store, 1, state_id=first.id)
    first.close()
    assert Watch().claim(store, StateDir(tmp_path).id) == 0


@pytest.mark.parametrize("other", ["", "another"])
def test_other_state_directory_proves_nothing(store: WorkerStore, tmp_path: Path, other: str) -> None:
    """The living worker has a directory of its own, or none."""
    beat(store, 1, state_id=other)
    with pytest.raises(NameTakenError):
        Watch(lambda second: beat(store, 1 + second, state_id=other)).claim(store, StateDir(tmp_path).id)


def test_copy_of_a_state_directory_is_another_one(tmp_path: Path) -> None:
    """Whoever starts a second worker from a copy does not take the first one's name."""
    first = StateDir(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    copy = StateDir(tmp_path / "copy")
    assert copy.id != first.id
    copy.close()
    assert StateDir(tmp_path / "copy").id == copy.id


def test_heartbeat_that_stands_still_is_dead(store: WorkerStore) -> None:
    beat(store, 1)
    assert Watch().claim(store) == int(PATIENCE_S) + 1


def test_worker_that_is_joining_is_believed_until_its_heartbeat_expires(store: WorkerStore) -> None:
    """It beats once, and then attaches its adapter, which may take longer than a heartbeat's interval."""
    beat(store, 1, run="joining")
    with pytest.raises(NameTakenError):
        Watch(lambda second: second == 20 and beat(store, 1)).claim(store)
    beat(store, 1, run="joining")
    assert Watch(lambda second: second == 20 and store.leave()).claim(store) == 20
    beat(store, 1, run="joining")
    assert Watch().claim(store) == JOIN_TTL_S
