"""What an update costs as workers and experts become more, and whether memory grows with them or with time.

Adapters of 64 KiB, so that the cost of an update is not that of its bytes. It is the CPU time of aggregator and Redis.
"""

import statistics
from collections.abc import Iterator
from contextlib import ExitStack

from ops.bench.adapters import LAYOUTS
from ops.bench.contest import take_turns
from ops.bench.fedmoe_side import DEFAULT_FORMAT, FedMoE
from ops.bench.plan import Plan
from ops.bench.result import Result, figure, ratio

LAYOUT = LAYOUTS["64kib"]
ENDURANCE_WORKERS = 16
SERVER = ("aggregator", "redis")


def run(plan: Plan) -> Iterator[Result]:
    """More workers of one expert; more experts, of one worker each; many updates."""
    by_workers = {n: FedMoE(f"growth_{n}_workers", LAYOUT, DEFAULT_FORMAT, workers=n) for n in plan.workers}
    by_experts = {
        n: FedMoE(f"growth_{n}_experts", LAYOUT, DEFAULT_FORMAT, workers=n, experts=n)
        for n in plan.experts
        if n > 1
    }
    everybody = [*by_workers.values(), *by_experts.values()]
    by_experts[1] = by_workers[1]  # one worker of one expert is where both begin
    with ExitStack() as stack:
        for contestant in everybody:
            stack.enter_context(contestant)
        samples = take_turns(everybody, rounds=plan.rounds, seconds=plan.seconds / 4)
        rss = {c.name: c.processes.rss_mib()["aggregator"] for c in everybody}
    costs = {name: [turn.cpu_ms(*SERVER) for turn in turns] for name, turns in samples.items()}
    for name, turns in samples.items():
        yield figure(f"{name}_updates_per_s", [turn.per_s for turn in turns], "updates/s")
        yield figure(f"{name}_server_cpu_ms", costs[name], "ms/update")
        yield figure(f"{name}_aggregator_rss_mib", [rss[name]], "MiB")
    for what, group in (("workers", by_workers), ("experts", by_experts)):
        fewest, most = (group[n].name for n in (min(group), max(group)))
        label = f"growth_{max(group)}_vs_{min(group)}_{what}"
        yield ratio(f"{label}_cpu", costs[most], costs[fewest])
        yield figure(f"{label}_rss", [rss[most] / rss[fewest]], "x")
    yield from _endurance(plan)


def _endurance(plan: Plan) -> Iterator[Result]:
    """Memory of the aggregator and of Redis after a tenth of the updates, and after all."""
    workers = ENDURANCE_WORKERS
    with FedMoE("endurance", LAYOUT, DEFAULT_FORMAT, workers=workers) as contestant:
        processes, seats = contestant.processes, contestant.seats

        def go_on(until: int) -> dict[str, float]:
            seats.go.set()
            processes.until(f"update {until}", lambda: sum(seats.done) >= until, timeout_s=60 + until / 20)
            contestant.pause()
            return processes.rss_mib()

        # The median of three looks: freed memory goes back at once or a little later.
        tenth = plan.updates // 10
        early = [go_on(tenth + look * max(1, tenth // 10)) for look in range(3)]
        late = [go_on(plan.updates + look * max(1, tenth // 10)) for look in range(3)]
    yield figure("endurance_updates", [plan.updates], "updates")
    for role in SERVER:
        first, last = (statistics.median(look[role] for look in looks) for looks in (early, late))
        yield figure(f"endurance_{role}_rss_first_mib", [first], "MiB")
        yield figure(f"endurance_{role}_rss_last_mib", [last], "MiB")
        yield figure(f"endurance_{role}_rss_growth_mib", [last - first], "MiB")
