"""How a worker left stays in Redis for `fedmoe status`, whatever ended it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedmoe.errors import FedMoEError, NameTakenError, RefusedError, StoppedError
from fedmoe.protocol.beat import Beat
from fedmoe.settings import WorkerSettings
from fedmoe.store.connection import Connection
from fedmoe.store.inspect import Inspector
from fedmoe.store.worker import WorkerStore
from fedmoe.util.stopping import Stop
from producers.worker import Worker
from tests.federation import make_expert

pytestmark = pytest.mark.one_server


def run(connection: Connection, tmp_path: Path, work: Callable[[Worker], None]) -> None:
    """A worker that has joined, and then does `work` instead of training."""
    settings = WorkerSettings(stream="sql_expert", data=tmp_path / "rows.jsonl", name="ann")
    worker = Worker(connection.settings, settings, stop=Stop(), report=lambda line: None)

    def trained() -> None:
        worker._has_joined = True
        WorkerStore(connection, "sql_expert", "ann").beat(Beat(run="1-00000000"), ttl_s=60)
        work(worker)

    worker._run = trained  # type: ignore[method-assign]  # all but the end is replaced
    worker.run()


def raises(error: BaseException) -> Callable[[Worker], None]:
    def work(worker: Worker) -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (RefusedError("another base"), "refused"), (FedMoEError("nobody decided it"), "failed"),
        (RuntimeError("out of memory"), "failed"), (KeyboardInterrupt("twice"), "failed"),
    ],
)  # fmt: skip
def test_what_ended_a_worker_is_told(
    connection: Connection, tmp_path: Path, error: BaseException, how: str
) -> None:
    """With the sentence that it ended with; it is raised all the same, and the name is free at once."""
    make_expert(connection)
    with pytest.raises(type(error)):
        run(connection, tmp_path, raises(error))
    (expert,) = Inspector(connection).federation().experts
    assert [(gone.name, gone.how, gone.reason) for gone in expert.left] == [("ann", how, str(error))]


def test_a_worker_that_ended_well_says_which_way(connection: Connection, tmp_path: Path) -> None:
    """It was stopped, or it has trained as much as it was asked to."""

    def how() -> str:
        (gone,) = Inspector(connection).federation().experts[0].left
        return gone.how

    make_expert(connection)
    run(connection, tmp_path, raises(StoppedError("stopped before the training began")))
    assert how() == "stopped"
    run(connection, tmp_path, lambda worker: None)
    assert how() == "stopped"
    run(connection, tmp_path, lambda worker: setattr(worker, "_is_done", True))
    assert how() == "finished"


def test_a_name_that_is_anothers_is_left_alone(connection: Connection, tmp_path: Path) -> None:
    """Its heartbeat is not this worker's to take away."""
    make_expert(connection)
    with pytest.raises(NameTakenError):
        run(connection, tmp_path, raises(NameTakenError("taken")))
    (expert,) = Inspector(connection).federation().experts
    assert ([worker.name for worker in expert.workers], expert.left) == (["ann"], ())
