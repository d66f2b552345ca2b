"""What the append-only file costs: the bytes that Redis writes to it for an update, and updates a second with it."""

import time
from collections.abc import Iterator

from fedmoe.protocol.codec import part_lengths
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from ops.bench.adapters import LAYOUTS
from ops.bench.contest import side_by_side
from ops.bench.fedmoe_side import DEFAULT_FORMAT, Client, FedMoE, aggregator_command, create_expert, make_spec
from ops.bench.plan import Plan
from ops.bench.processes import Processes
from ops.bench.result import Result, figure

EXPERT = "expert"
UPDATES = 16  # of a round; in int4 the weights are written once in so many


def run(plan: Plan) -> Iterator[Result]:
    """Bytes with one update a commit; then three clients, with the file (everysec) and without it, in turns."""
    yield figure("aof_bytes_vs_update", _bytes(plan), "x")
    layout = LAYOUTS[plan.size]
    plain = FedMoE(f"memory_{plan.size}", layout, DEFAULT_FORMAT)
    kept = FedMoE(f"aof_{plan.size}", layout, DEFAULT_FORMAT, aof=True)
    with plain, kept:
        yield from side_by_side(
            kept, plain, rounds=plan.rounds, seconds=plan.seconds, rates="aof_vs_memory", costs="aof_vs_memory_cpu"
        )  # fmt: skip


def _bytes(plan: Plan) -> list[float]:
    """Growth of the file in each round, by the bytes of its updates; one worker, so one update a commit."""
    layout = LAYOUTS[plan.size]
    with Processes("aof_bytes") as processes:
        url = processes.redis(aof=True)
        meter = Connection(RedisSettings(url=url)).client
        meter.config_set("auto-aof-rewrite-percentage", 0)  # a rewrite would begin a new file
        create_expert(url, EXPERT, make_spec(layout, DEFAULT_FORMAT))
        without_merges = (
            "--gateway-interval",
            "3600",
        )  # the merged gateway is written besides, once a second at most
        processes.command("aggregator", *aggregator_command(url, [EXPERT], *without_merges))
        client = Client(url, EXPERT, "worker")
        _push(client, 1)  # it pins the base model, and the first tail begins
        rounds = []
        for _ in range(plan.rounds):
            before = meter.info("persistence")["aof_current_size"]
            _push(client, UPDATES)
            rounds.append(meter.info("persistence")["aof_current_size"] - before)
    sent = UPDATES * sum(part_lengths(layout.numel, DEFAULT_FORMAT))
    return [written / sent for written in rounds]


def _push(client: Client, updates: int) -> None:
    while updates:
        updates -= client.turn()
        time.sleep(0.001)
