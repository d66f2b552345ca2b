"""A figure and its bar; the table and the JSON."""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# What the figures of these names must reach. A figure without a bar is there to be looked at.
BARS: dict[str, tuple[str, float]] = {
    "fp32_vs_raw": (">=", 0.8),
    "default_vs_raw_fp32": (
        ">=",
        1.5,
    ),  # where the commit before snapshot and tail has 0.62; it depends on the machine
    "updates_vs_http": (">=", 10.0),
    "cpu_vs_http": ("<=", 1 / 8),
    "flower_updates": (">=", 100.0),
    "flower_cpu": ("<=", 1 / 50),
    "aof_bytes_vs_update": ("<=", 3.5),
    "aof_vs_memory": (">=", 0.85),
    "vs_before_server_cpu": ("<=", 0.4),
    "vs_before_large_updates": (">=", 4.0),
    "vs_before_visible_p50": ("<=", 0.7),
    "cluster_vs_one_cpu": ("<=", 1.25),
    "publish_to_visible_p50_ms": ("<=", 60.0),
    "wire_bytes_default_vs_fp32": ("<=", 1 / 4),
    "wire_bytes_int4_vs_fp32": ("<=", 1 / 7),
    "scale_update_cpu_most_vs_fewest": ("<=", 1.2),
    "turns_both_vs_one": (">=", 0.97),
    "overlap_10s": (">=", 0.98),
    "overlap_1s": (">=", 0.98),
    "overlap_1s_at_least": (">=", 0.97),
    "quality_default_vs_fp32": ("<=", 1.01),
    "learning_real_share": (">=", 0.97),  # in real processes, by the rules of a new gateway
    "learning_real_least_share": (">=", 0.94),
    "learning_real_above_merged_points": (">=", 8.0),
    "learning_gateway_above_merged_points": (">=", 8.0),  # on the virtual clock
    "learning_fitted_above_fixed_points": (">=", 0.0),  # of each seed; the best fixed scale on the test rows
    "learning_short_fitted_above_fixed_points": (">=", -2.0),
    "learning_routed_share": (">=", 0.97),
    "learning_time_own_pace_vs_rounds_straggler": ("<=", 0.5),
    "race_alike": ("<=", 1 / 2),  # FedMoE's time ÷ Flower's
    "race_straggler": ("<=", 1 / 3),
    "learning_short_gateway_share": (">=", 0.9),  # one seed and few rows
    "learning_short_gateway_above_merged_points": (">=", 4.0),
}


@dataclass(frozen=True, slots=True)
class Result:
    """One figure: the median of n rounds with the least and the most; `bar` and `met` are None if it has no bar."""

    name: str
    value: float
    unit: str
    min: float
    max: float
    n: int
    bar: str | None
    met: bool | None

    def __str__(self) -> str:
        spread = "" if self.n == 1 else f"{self.min:.4g} .. {self.max:.4g}, n = {self.n}"
        verdict = "" if self.met is None else f"bar {self.bar}: {'met' if self.met else 'MISSED'}"
        return f"{self.name:<46} {self.value:>9.4g} {self.unit:<14} {spread:<32} {verdict}".rstrip()


def figure(name: str, values: Sequence[float], unit: str, *, value: float | None = None) -> Result:
    """The result of a figure measured once in each round; `value` is the median if not given."""
    value = statistics.median(values) if value is None else value
    bar, met = None, None
    if name in BARS:
        sign, bound = BARS[name]
        bar = f"{sign} {bound:.4g}"
        met = bool(value >= bound if sign == ">=" else value <= bound)
    return Result(name, value, unit, min(values), max(values), len(values), bar, met)


def percentiles(name: str, ms: Sequence[float]) -> Iterator[Result]:
    """Median and 99th percentile of single updates' milliseconds."""
    yield figure(f"{name}_p50_ms", ms, "ms")
    p99 = statistics.quantiles(ms, n=100, method="inclusive")[98] if len(ms) > 1 else ms[0]
    yield figure(f"{name}_p99_ms", ms, "ms", value=p99)


def ratio(name: str, above: Sequence[float], below: Sequence[float]) -> Result:
    """The median of the ratios of single rounds: what slowed a whole round cancels out."""
    return figure(name, [a / b for a, b in zip(above, below, strict=True)], "x")


def at_least(name: str, values: Sequence[float]) -> Result:
    """The lower end of a 95 % interval of the median, by order statistics: nothing is assumed about the values.

    Fewer than so many values are below the median with a probability of at most 2.5 %; there are six values or more.
    """
    n, below, chance = len(values), 0, 0.5 ** len(values)
    while chance + math.comb(n, below + 1) * 0.5**n <= 0.025:
        below += 1
        chance += math.comb(n, below) * 0.5**n
    return figure(name, values, "x", value=sorted(values)[below])


def write_json(path: Path, results: Sequence[Result]) -> None:
    """Write the results as a JSON list."""
    path.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
