"""A large adapter: rank 16 on all linear layers of a 7 B model, 40 million values, 160 MB in fp32.

Updates a second, how long one takes from its encoding until its worker has the weights with it, and how much memory
that takes. Two workers, so that an update is folded on top of another.
"""

from collections.abc import Iterator
from contextlib import ExitStack

from ops.bench.adapters import LAYOUTS, fp32_bytes
from ops.bench.contest import take_turns
from ops.bench.fedmoe_side import FedMoE
from ops.bench.plan import Plan
from ops.bench.result import Result, figure

WORKERS = 2


def run(plan: Plan) -> Iterator[Result]:
    """Every format of the plan, one after the other: each needs gigabytes."""
    layout = LAYOUTS[plan.large]
    yield figure("size_fp32_mib", [fp32_bytes(layout) / 2**20], "MiB")
    for form in plan.formats:
        with ExitStack() as stack:
            contestant = stack.enter_context(
                FedMoE(f"size_{form}", layout, form, workers=WORKERS, n_clients=WORKERS)
            )
            turns = take_turns([contestant], rounds=plan.rounds, seconds=plan.seconds)[contestant.name]
            peaks = contestant.processes.peak_rss_mib()
        yield figure(f"size_{form}_updates_per_s", [turn.per_s for turn in turns], "updates/s")
        seconds = [s for turn in turns for s in turn.update_s]
        yield figure(f"size_{form}_push_to_pulled_s", seconds, "s")
        for role, mib in peaks.items():
            yield figure(f"size_{form}_peak_rss_mib_{role}", [mib], "MiB")
