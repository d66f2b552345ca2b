"""A golden trace: the aggregation does with the updates in `tests/golden/trace-*/` what it did when they were kept."""

from pathlib import Path

import pytest

from fedmoe.store.connection import Connection
from tests.golden.trace import play

TRACES = sorted((Path(__file__).parent.parent / "golden").glob("trace-*"))
pytestmark = pytest.mark.one_server  # of the servers, other tests compare the bytes


def test_there_is_a_trace() -> None:
    """Else the next test would pass without one."""
    assert TRACES


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.name)
def test_trace_gives_the_same_bytes_and_the_same_log(connection: Connection, trace: Path) -> None:
    """If it is meant to change: `python -m tests.golden trace-1`, and read the diff."""
    made = play(connection, trace)
    assert made["trace.json"].decode() == (trace / "out" / "trace.json").read_text()
    assert made["weights.safetensors"] == (trace / "out" / "weights.safetensors").read_bytes()
