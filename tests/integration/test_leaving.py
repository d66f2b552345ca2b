"""How a worker left stays in Redis for `fedmoe status`, whatever ended it."""

from collections.abc import Callable
from contextlib import suppress

import pytest

from fedmoe.errors import FedMoEError, NameTakenError, RefusedError, StoppedError
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.store.connection import Connection
from fedmoe.store.inspect import Inspector
from producers.membership import Membership
from tests.federation import FINGERPRINT, make_expert

pytestmark = pytest.mark.one_server


def run(connection: Connection, work: Callable[[Membership], None]) -> None:
    """A worker that has joined, and then does `work` instead of training."""
    with suppress(StoppedError), Membership(connection.settings, "sql_expert", "ann", wait=False) as member:
        member.look()
        member.claim(BaseIdentity(fingerprint=FINGERPRINT))
        work(member)


def raises(error: BaseException) -> Callable[[Membership], None]:
    def work(member: Membership) -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (RefusedError("another base", about="fingerprint"), "refused"),
        (FedMoEError("nobody decided it", about="drain"), "failed"),
        (RuntimeError("out of memory"), "failed"), (KeyboardInterrupt("twice"), "failed"),
    ],
)  # fmt: skip
def test_what_ended_a_worker_is_told(connection: Connection, error: BaseException, how: str) -> None:
    """With the sentence that it ended with; it is raised all the same, and the name is free at once."""
    make_expert(connection)
    with pytest.raises(type(error)):
        run(connection, raises(error))
    (expert,) = Inspector(connection).federation().experts
    assert [(gone.name, gone.how, gone.reason) for gone in expert.left] == [("ann", how, str(error))]


def test_a_worker_that_ended_well_says_which_way(connection: Connection) -> None:
    """It was stopped, or it has trained as much as it was asked to."""

    def how() -> str:
        (gone,) = Inspector(connection).federation().experts[0].left
        return gone.how

    make_expert(connection)
    run(connection, raises(StoppedError("stopped before the training began", about="training")))
    assert how() == "stopped"
    run(connection, lambda member: None)
    assert how() == "stopped"
    run(connection, lambda member: setattr(member, "is_done", True))
    assert how() == "finished"


def test_a_name_that_is_anothers_is_left_alone(connection: Connection) -> None:
    """Its heartbeat is not this worker's to take away."""
    make_expert(connection)
    with pytest.raises(NameTakenError):
        run(connection, raises(NameTakenError("taken", about="ann")))
    (expert,) = Inspector(connection).federation().experts
    assert ([worker.name for worker in expert.workers], expert.left) == (["ann"], ())
