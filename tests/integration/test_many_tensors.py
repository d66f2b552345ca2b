"""What an update costs the interpreter does not depend on the number of tensors: the adapter is one flat vector."""

import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest
import torch

from fedmoe.protocol.layout import Layout
from fedmoe.store.connection import Connection
from tests.federation import ScriptedWorker, make_expert, serve, small_spec

FEW, MANY = 2, 2002
NUMEL = FEW * MANY
pytestmark = pytest.mark.one_server


def lines_of_an_exchange(connection: Connection, name: str, n_tensors: int, wire_format: str) -> int:
    """Lines of Python that worker and aggregator execute for one update, once nothing is new to them any more."""
    layout = Layout.of([(f"t{number:04}", (NUMEL // n_tensors,)) for number in range(n_tensors)])
    spec = small_spec(layout=layout, wire_format=wire_format)
    expert = make_expert(connection, name, spec, torch.zeros(NUMEL))
    worker = ScriptedWorker(connection, spec, expert=name)
    lines: Counter[str] = Counter()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            lines[frame.f_code.co_filename] += 1
        return trace

    for traced in (False, False, True):
        before = sys.gettrace()
        if traced:
            sys.settrace(trace)
        try:
            worker.push(0.01)
            assert serve(expert) == ["applied"]
            worker.pull()
        finally:
            sys.settrace(before)
    return lines.total()


@pytest.mark.parametrize("wire_format", ["int4", "fp32"])
def test_many_tensors_are_no_more_work(connection: Connection, wire_format: str) -> None:
    """With one more line for each tensor it would be two thousand more."""
    few, many = (lines_of_an_exchange(connection, f"of_{n}", n, wire_format) for n in (FEW, MANY))
    assert few > 1000
    assert abs(many - few) < (MANY - FEW) // 4, (few, many)
