"""Breadth-first search through every interleaving of a small federation, with crashes, lost replies and failovers.

In every state the invariants must hold, and a run from there without further faults must come to rest with nothing
lost. The first state that breaks this is a shortest one, and its trace is told.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

from fedmoe.protocol import weights_parts
from tests.protocol.actors import Rules
from tests.protocol.model import Model
from tests.protocol.state import Label, Scope, State


class ViolationError(Exception):
    """A state that should not be, and how to get there."""

    def __init__(self, what: str, trace: list[str], states: int) -> None:
        super().__init__("\n".join([what, *(f"  {n}. {line}" for n, line in enumerate(trace, 1))]))
        self.what = what
        self.trace = trace
        self.states = states


@dataclass(frozen=True)
class Found:
    """What a search that found nothing looked at."""

    states: int
    seconds: float
    exhausted: bool


def search(
    scope: Scope,
    rules: Rules | None = None,
    *,
    limit: int = 10**7,
    report: Callable[[int], None] = lambda _: None,
) -> Found:
    """Look at every state of the scope, at most `limit`.

    Raises:
        ViolationError: with a shortest trace to a state that should not be.
    """
    with ExitStack() as replaced:
        replaced.enter_context(strings_of_one_value() if scope.parts else nullcontext())
        for where in rules.throughout if rules else ():
            replaced.enter_context(patch.object(*where))
        return _search(Model(scope, rules), limit, report)


@contextmanager
def strings_of_one_value() -> Iterator[None]:
    """All weights lie in parts, each of one value."""
    with patch.object(weights_parts, "WHOLE_BYTES", 0), patch.object(weights_parts, "PART_BYTES", 4):
        yield


def _search(model: Model, limit: int, report: Callable[[int], None]) -> Found:
    began = time.monotonic()
    first = model.first()
    parents: dict[State, tuple[State, Label] | None] = {first: None}
    waiting = deque([first])

    def trace(state: State) -> list[str]:
        lines = []
        while (step := parents[state]) is not None:
            state, label = step
            lines.append(model.words(label))
        return lines[::-1]

    while waiting and len(parents) < limit:
        state = waiting.popleft()
        if wrong := model.check(state):
            raise ViolationError(wrong, trace(state), len(parents))
        wrong, labels = model.check_end(state)
        if wrong:
            told = [
                *trace(state),
                "... and from here without further faults:",
                *map(model.words, labels[:100]),
            ]
            raise ViolationError(wrong, told, len(parents))
        for label, after in model.successors(state):
            if after not in parents:
                parents[after] = (state, label)
                waiting.append(after)
                if len(parents) % 50_000 == 0:
                    report(len(parents))
    return Found(len(parents), time.monotonic() - began, not waiting)
