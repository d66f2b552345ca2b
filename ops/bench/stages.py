"""What an update costs the server, stage by stage: CPU milliseconds of the aggregator, and those of Redis meanwhile.

One process plays a worker and the aggregator's part for one expert, one after the other, so Redis works for one stage
at a time. It is the real code; the loop around it, leases, heartbeats and the merged gateway are left out. Each update
is a commit of its own.
"""

import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Any
from unittest import mock

import torch

from consumers import expert as consumer
from consumers import payload
from consumers.expert import Expert
from consumers.packer import Packer
from fedmoe.protocol.growth import Growth
from fedmoe.protocol.update import Part
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.util.memory import keep_freed
from fedmoe.util.threads import Threads, n_cores
from ops.bench.adapters import LAYOUTS
from ops.bench.fedmoe_side import DEFAULT_FORMAT, Client, create_expert, make_spec
from ops.bench.plan import Plan
from ops.bench.processes import Processes, cpu_s
from ops.bench.result import Result, figure

EXPERT = "expert"
UPDATES = 16  # of a round; the weights are written once in so many
REST = "rest"
WORKERS = ("publish", "pull")  # stages of the worker: only Redis's time counts
# Where each stage begins and ends; the innermost one counts.
STAGES: tuple[tuple[str, Any, str], ...] = (
    ("read", ExpertStore, "read"),
    ("read", ExpertStore, "headers"),
    ("check", Part, "matches"),
    ("fold", payload, "fold_frame"),
    ("tail", Growth, "add"),
    ("digest", consumer, "digests_of"),
    ("pack", Packer, "pack"),
    ("commit", ExpertStore, "commit"),
)


class Clock:
    """Adds up the CPU seconds of this process and of Redis by stage."""

    def __init__(self, redis_pid: int) -> None:
        self.ours: dict[str, float] = {}
        self.redis: dict[str, float] = {}
        self._pid = redis_pid
        self._stack: list[str] = []
        self._last = (0.0, 0.0)

    def _charge(self) -> None:
        now = time.process_time(), cpu_s(self._pid)
        if self._stack:
            for seconds, before, after in zip((self.ours, self.redis), self._last, now, strict=True):
                seconds[self._stack[-1]] = seconds.get(self._stack[-1], 0.0) + after - before
        self._last = now

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The block is a stage, but for the stages inside it."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def watching(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as a stage."""

        def watched(*arguments: Any, **named: Any) -> Any:
            with self.stage(name):
                return function(*arguments, **named)

        return watched

    def watching_each(
        self, name: str, function: Callable[..., Generator[Any, None, None]]
    ) -> Callable[..., Generator[Any, None, None]]:
        """The function, whose generator's steps are the stage."""

        def watched(*arguments: Any) -> Generator[Any, None, None]:
            with closing(function(*arguments)) as items:
                while True:
                    with self.stage(name):
                        item = next(items, None)
                    if item is None:
                        return
                    yield item

        return watched


def run(plan: Plan) -> Iterator[Result]:
    """With the append-only file off and on."""
    keep_freed(blocks_mib=4, free_mib=32, heaps=4)  # as `fedmoe aggregator run`
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for kind, aof in (("memory", False), ("file", True)):
            yield from _measure(plan, kind, aof)
    finally:
        torch.set_num_threads(threads)


def _measure(plan: Plan, kind: str, aof: bool) -> Iterator[Result]:
    rounds: list[Clock] = []
    with Processes(f"stages_{kind}") as processes, ThreadPoolExecutor(n_cores()) as pool:
        url = processes.redis(aof=aof)
        spec = make_spec(LAYOUTS[plan.size], DEFAULT_FORMAT)
        create_expert(url, EXPERT, spec)
        store = ExpertStore(Connection(RedisSettings(url=url)), EXPERT)
        expert = Expert(store, spec, aggregator="bench", threads=Threads(pool, n_cores()))
        expert.load()
        expert.process(())  # it writes what it knows into meta
        client = Client(url, EXPERT, "worker")
        for _ in range(plan.rounds + 1):
            rounds.append(Clock(processes.started[0].pid))
            _updates(rounds[-1], expert, client)
    for who in ("ours", "redis"):
        per_stage = [getattr(clock, who) for clock in rounds[1:]]  # the first round warms up
        stages = [stage for stage in per_stage[0] if who == "redis" or stage not in WORKERS]
        name = f"stages_{kind}_{'aggregator' if who == 'ours' else who}"
        for stage in stages:
            yield figure(
                f"{name}_{stage}_cpu_ms", [1000 * one[stage] / UPDATES for one in per_stage], "ms/update"
            )
        total = [1000 * sum(one[stage] for stage in stages) / UPDATES for one in per_stage]
        yield figure(f"{name}_cpu_ms", total, "ms/update")


def _updates(clock: Clock, expert: Expert, client: Client) -> None:
    with ExitStack() as stack:
        for name, owner, attribute in STAGES:
            function = clock.watching(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, function))
        parts = clock.watching_each("receive", ExpertStore.parts)
        stack.enter_context(mock.patch.object(ExpertStore, "parts", parts))
        for _ in range(UPDATES):
            client.train()
            with clock.stage("publish"):
                client.publish(client.make_update())
            with clock.stage(REST):
                expert.process(expert.store.read(block_ms=1, count=64))
            with clock.stage("pull"):
                while client.busy:
                    client.next_at = 0.0
                    client.turn()
