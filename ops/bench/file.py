"""What the append-only file costs: the bytes that Redis writes to it for an update, and updates a second with it."""

from collections.abc import Iterator

from ops.bench.contest import side_by_side
from ops.bench.plan import Plan
from ops.bench.release import contestant, written
from ops.bench.result import Result, figure


def run(plan: Plan) -> Iterator[Result]:
    """Bytes with one update a commit; then three clients, with the file (everysec) and without it, in turns."""
    yield figure("aof_bytes_vs_update", written(plan.size, plan.rounds), "x")
    plain = contestant("memory", plan.size, f"memory_{plan.size}")
    kept = contestant("file", plan.size, f"aof_{plan.size}")
    with plain, kept:
        yield from side_by_side(
            kept, plain, rounds=plan.rounds, seconds=plan.seconds, rates="aof_vs_memory", costs="aof_vs_memory_cpu"
        )  # fmt: skip
