"""What the append-only file costs: the bytes that Redis writes to it for an update, and updates a second with it.

`defaults` is the file with Redis's own settings, which rewrite it at 64 MiB and compress the rewritten part; the others
have those of ops/redis.conf.
"""

from collections.abc import Iterator

from ops.bench.adapters import LAYOUTS
from ops.bench.contest import take_turns
from ops.bench.fedmoe_side import DEFAULT_FORMAT, FedMoE
from ops.bench.plan import Plan
from ops.bench.release import contestant, written
from ops.bench.result import Result, figure, ratio

DEFAULTS = ("--auto-aof-rewrite-min-size", "64mb", "--rdbcompression", "yes")


def run(plan: Plan) -> Iterator[Result]:
    """Bytes with one update a commit; then three clients, with the file (everysec) and without it, in turns."""
    yield figure("aof_bytes_vs_update", written(plan.size, plan.rounds), "x")
    plain = contestant("memory", plan.size, f"memory_{plan.size}")
    kept = contestant("file", plan.size, f"aof_{plan.size}")
    defaults = FedMoE(
        f"aof_defaults_{plan.size}", LAYOUTS[plan.size], DEFAULT_FORMAT, aof=True, redis_options=DEFAULTS
    )
    with plain, kept, defaults:
        samples = take_turns([kept, plain, defaults], rounds=plan.rounds, seconds=plan.seconds)
    per_s = {name: [turn.per_s for turn in turns] for name, turns in samples.items()}
    cpu_ms = {name: [turn.cpu_ms() for turn in turns] for name, turns in samples.items()}
    for name in samples:
        yield figure(f"{name}_updates_per_s", per_s[name], "updates/s")
        yield figure(f"{name}_cpu_ms", cpu_ms[name], "ms/update")
    yield ratio("aof_vs_memory", per_s[kept.name], per_s[plain.name])
    yield ratio("aof_vs_memory_cpu", cpu_ms[kept.name], cpu_ms[plain.name])
    yield ratio("aof_defaults_vs_memory", per_s[defaults.name], per_s[plain.name])
