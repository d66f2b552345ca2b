"""The builder of the merged gateway rests after a rebuild, and rebuilds once more when it ends."""

import threading
from itertools import count

import pytest

from consumers.gateway.builder import GatewayBuilder
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
