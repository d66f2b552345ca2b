"""The builder of the merged gateway rests after a rebuild, and rebuilds once more when it ends."""

import threading
from itertools import count

import pytest

from consumers.gateway.builder import GatewayBuilder
from fedmoe.errors import RedisUnfitError
from fedmoe.settings import GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.util.rest import Rest
from tests.federation import ScriptedWorker, make_expert, serve, small_spec
from tests.processes import eventually

pytestmark = pytest.mark.one_server


def test_it_rests_and_at_its_end_rebuilds_all_the_same(connection: Connection, connect) -> None:
    expert = make_expert(connection)
    asked = []

    def clock() -> float:  # it stands still: a rest never ends
        asked.append(True)
        return 0.0

    seconds = count()
    rest = Rest(9.0, clock=clock, cpu_clock=lambda: float(next(seconds)))
    settings = GatewaySettings(interval_s=0.01)
    builder = GatewayBuilder(connect(), settings, holder="agg-1", lease_s=5.0, rest=rest)
    merged = GatewayStore(connection).merged
    stop = threading.Event()
    thread = threading.Thread(target=builder.run, args=(stop,))
    thread.start()
    try:
        eventually("the first rebuild", merged)
        first = merged().experts["sql_expert"].weights_commit
        ScriptedWorker(connection, small_spec()).push(0.5)
        assert serve(expert) == ["applied"]
        before = len(asked)
        eventually("three turns", lambda: len(asked) >= before + 3)
        assert merged().experts["sql_expert"].weights_commit == first
    finally:
        stop.set()
        thread.join()
    assert merged().experts["sql_expert"].weights_commit == expert.meta.weights_commit != first


def test_a_rest_after_a_failure_is_no_success(
    connection: Connection, connect, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would log that the rebuild works again, and status would no longer show the problem."""
    make_expert(connection)
    turns = []

    def clock() -> float:
        turns.append(True)
        return 0.0

    def broken(*_: object) -> None:
        raise RedisUnfitError("Redis does not take the merged gateway", about="size")

    seconds = count()
    rest = Rest(9.0, clock=clock, cpu_clock=lambda: float(next(seconds)))
    builder = GatewayBuilder(
        connect(), GatewaySettings(interval_s=0.01), holder="agg-1", lease_s=5.0, rest=rest
    )
    monkeypatch.setattr(builder, "_build", broken)
    problem = GatewayStore(connection).keys.problem
    stop = threading.Event()
    thread = threading.Thread(target=builder.run, args=(stop,))
    thread.start()
    try:
        eventually("the problem", lambda: connection.client.hgetall(problem))
        before = len(turns)
        eventually("three turns", lambda: len(turns) >= before + 3)
        assert connection.client.hgetall(problem)
    finally:
        stop.set()
        thread.join()
    assert "works again" not in caplog.text
