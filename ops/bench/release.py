"""What a release is measured with: runs in the environment of that release, on its own `fedmoe` and `ops.bench`.

    python release.py memory 9mib       lines on stdin: the seconds of a turn; answers on stdout in JSON
    python release.py written 9mib 5    the bytes of the append-only file, by round

So this module uses only what both releases have.
"""

import dataclasses
import json
import signal
import sys
import time

from fedmoe.protocol.codec import part_lengths
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from ops.bench.adapters import LAYOUTS
from ops.bench.contest import Contestant, Sample
from ops.bench.fedmoe_side import (
    DEFAULT_FORMAT,
    Client,
    FedMoE,
    aggregator_command,
    create_expert,
    make_spec,
)
from ops.bench.latency import Idle
from ops.bench.processes import BenchError, Processes

EXPERT = "expert"
UPDATES = 16  # of a round; in int4 the weights are written once in so many


class Visible(Idle):
    """`latency.Idle` whose samples have the seconds from encoding to visible of each update as `update_s`."""

    def turn(self, seconds: float) -> Sample:
        """As a Contestant's."""
        first = len(self.visible_ms)
        sample = super().turn(seconds)
        if len(self.visible_ms) == first:
            raise BenchError(f"{self.name}: the observer saw none of the updates")
        return dataclasses.replace(sample, update_s=[ms / 1000 for ms in self.visible_ms[first:]])


def contestant(kind: str, size: str, name: str) -> Contestant:
    """A federation in the default format.

    Args:
        kind: "memory", or "file" with the append-only file: three clients that push and pull. "idle": one publishes,
            another one watches.
        size: of the adapter.
        name: of the contestant.
    """
    if kind == "idle":
        return Visible(name, LAYOUTS[size], DEFAULT_FORMAT)
    return FedMoE(name, LAYOUTS[size], DEFAULT_FORMAT, aof=kind == "file")


def written(size: str, rounds: int) -> list[float]:
    """Growth of the append-only file in each round, by the bytes of its updates; one worker, so one update a commit."""
    layout = LAYOUTS[size]
    with Processes("aof_bytes") as processes:
        url = processes.redis(aof=True)
        meter = Connection(RedisSettings(url=url)).client
        meter.config_set("auto-aof-rewrite-percentage", 0)  # a rewrite would begin a new file
        create_expert(url, EXPERT, make_spec(layout, DEFAULT_FORMAT))
        # The merged gateway is written besides, once a second at most.
        without_merges = ("--gateway-interval", "3600")
        processes.command("aggregator", *aggregator_command(url, [EXPERT], *without_merges))
        client = Client(url, EXPERT, "worker")
        _push(client, 1)  # it pins the base model, and the first tail begins
        growth = []
        for _ in range(rounds):
            before = meter.info("persistence")["aof_current_size"]
            _push(client, UPDATES)
            growth.append(meter.info("persistence")["aof_current_size"] - before)
    sent = UPDATES * sum(part_lengths(layout.numel, DEFAULT_FORMAT))
    return [n_bytes / sent for n_bytes in growth]


def _push(client: Client, updates: int) -> None:
    while updates:
        updates -= client.turn()
        time.sleep(0.001)


def _serve(kind: str, size: str) -> None:
    """Take turns until stdin ends; the first answer says that all processes are at work."""
    with contestant(kind, size, f"before_{kind}_{size}") as one:
        print("{}", flush=True)
        for line in sys.stdin:
            print(json.dumps(dataclasses.asdict(one.turn(float(line)))), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the processes are ended first
    match sys.argv[1:]:
        case ["written", of_size, of_rounds]:
            print(json.dumps(written(of_size, int(of_rounds))))
        case [of_kind, of_size]:
            _serve(of_kind, of_size)
