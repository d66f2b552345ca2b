"""Play one hazard, and see what came of it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from tests.hazards.hazard import Hazard
from tests.hazards.world import World


def play(hazard: Hazard, world: World) -> None:
    """Play a scenario; whatever happened in it, the weights must be those of a sequential run over the log."""
    hazard.scenario(world)
    world.check_faults_happened()
    world.expect_replay()


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.found.add(str(record.exc_info and record.exc_info[1]))


@contextmanager
def unexpected_errors() -> Iterator[set[str]]:
    """Collects what the loops of the processes catch and have no sentence for."""
    handler = _Errors()
    logging.getLogger().addHandler(handler)
    try:
        yield handler.found
    finally:
        logging.getLogger().removeHandler(handler)
