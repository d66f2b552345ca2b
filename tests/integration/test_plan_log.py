"""What a line of an expert's log takes in Redis, for `fedmoe plan`."""

import pytest

from fedmoe.protocol.plan import LOG_LINE_BYTES
from fedmoe.store.connection import Connection
from tests.federation import ScriptedWorker, make_expert, serve


@pytest.mark.one_server
def test_a_line_of_the_log_takes_what_the_plan_says(connection: Connection) -> None:
    """Within 20 %, in a log that is long enough for what a stream takes by itself not to count."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    for _ in range(300):
        worker.push(1e-4)
        serve(expert)
        worker.pull()
    lines = connection.client.xlen(expert.store.keys.log)
    taken = connection.client.memory_usage(expert.store.keys.log, samples=0) / lines
    assert taken == pytest.approx(LOG_LINE_BYTES, rel=0.2)
