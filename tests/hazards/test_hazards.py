"""Every hazard, played on a real server, with and without its rule.

The tests step real clients and the project's own loops, one request or one turn at a time. `test_holds[H05a]` plays a
scenario; `test_fails_without_its_rule[H05a]` plays it with the rule taken out and expects the scenario's own
assertion to fail. Run all with `python -m tests.hazards` or `pytest tests/hazards -v`, one number with `-k H05`.

H00  an absence of a week; clocks that jump; a death before the commit; a trimmed stream
H01  two aggregators commit on one state
H02  a decision that its worker has seen is lost in a failover
H03  an entry that was read but not committed
H04  a failover undoes more than one decision
H05  a killed worker, a restored checkpoint
H06  a pull after a rollback, or during a commit
H07  late updates of an old run; two processes of one name
H08  an incomplete update; a forged entry
H09  an aggregator with stale memory removes entries
H10  a duplicate of a refused update
H11  a failover between two commands; a worker that leaves
H12  the consumer group is lost
H13  a base from before a rollback
H14  the gateway after a failover, and with two builders
H15  a load during a commit
H16  an update for another lineage
H17  an entry with the highest possible id
H18  a key of the wrong type in the middle of EXEC
H19  a part of an expert is removed
H20  Redis comes back from an older file than an aggregator's retained state
H21  an operator restores a backup that is older than an aggregator's retained state
H22  a worker is started while Redis is behind
H23  an operator changes the rules between two updates
H24  an operator rolls an expert back while it is trained
H25  what the server optimizer remembers
H26  an expert is held, because its validation loss got worse
H27  a domain vector in an emptied Redis, or in a refused update
H28  weights of an earlier version, and a tail of updates on top of them
H29  weights that lie in several Redis strings
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from fedmoe.store.connection import Connection
from tests.hazards.play import play, unexpected_errors
from tests.hazards.table import HAZARDS
from tests.hazards.units import HazardError
from tests.hazards.world import World


@pytest.fixture
def world(redis_url: str, tmp_path: Path) -> Iterator[World]:
    """An empty server and directory."""
    made = World(redis_url, tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("name", HAZARDS)
def test_holds(name: str, world: World) -> None:
    """Nothing is lost, doubled or stuck, and the weights are those of a sequential run over the log."""
    with unexpected_errors() as errors:
        play(HAZARDS[name], world)
    assert not errors


@pytest.mark.parametrize("name", HAZARDS)
def test_fails_without_its_rule(name: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its rule the scenario fails in its own assertion, with the expected message.

    It fails for no other reason: no process raised an unexpected error.
    """
    hazard = HAZARDS[name]
    for patch in hazard.without:
        monkeypatch.setattr(*patch)
    with unexpected_errors() as errors, pytest.raises(HazardError) as caught:
        play(hazard, world)
    assert hazard.symptom in str(caught.value)
    assert errors == hazard.errors


def test_contents_name_every_hazard() -> None:
    """The list above has the numbers of the table."""
    assert __doc__
    listed = {line[:3] for line in __doc__.splitlines() if line.startswith("H")}
    assert listed == {name[:3] for name in HAZARDS}


def test_server_blocked_by_the_highest_id(connection: Connection) -> None:
    """H17, a fact about the server: every later XADD fails, also when the stream was emptied."""
    client = connection.client
    client.xadd("s", {"a": "b"}, id=f"{2**64 - 1}-{2**64 - 1}")
    client.xtrim("s", 0)
    with pytest.raises(redis.ResponseError, match="exhausted"):
        client.xadd("s", {"a": "b"})


def test_server_executes_half_of_a_transaction(connection: Connection) -> None:
    """H18, a fact about the server: an EXEC with a WRONGTYPE in its middle has executed the other commands."""
    client = connection.client
    client.set("log", "oops")
    pipe = client.pipeline(transaction=True)
    pipe.set("before", "1").xadd("log", {"a": "b"}).set("after", "1")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        pipe.execute()
    assert client.mget("before", "after") == [b"1", b"1"]
