"""Ports of loopback for the servers of tests: no two tests that run at once ever get the same."""

import itertools
import os
import random
import socket
from collections.abc import Iterator

# Below the range from which Linux takes the ports of clients (32768 to 60999): what is free now stays free.
FIRST, EACH, WORKERS = 20_000, 1_000, 12


def _ports() -> Iterator[int]:
    """The thousand ports of this worker process of pytest, from a random one on: two runs at once seldom meet."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
    begin = random.SystemRandom().randrange(EACH)
    return itertools.cycle(FIRST + worker * EACH + (begin + number) % EACH for number in range(EACH))


_PORTS = _ports()


def free_port() -> int:
    """A port that nobody listens on; each call gives another one."""
    for port in itertools.islice(_PORTS, EACH):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"none of {EACH} ports is free")
