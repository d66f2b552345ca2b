"""Updates a second over TLS and over plain TCP, in turns: what encryption costs. Needs a server with TLS."""

from collections.abc import Iterator

from ops.bench.adapters import LAYOUTS
from ops.bench.contest import take_turns
from ops.bench.fedmoe_side import DEFAULT_FORMAT, FedMoE
from ops.bench.plan import Plan
from ops.bench.result import Result, figure, ratio


def run(plan: Plan) -> Iterator[Result]:
    """Both in the default format, and the ratio of their rates and of their CPU."""
    layout = LAYOUTS[plan.size]
    plain = FedMoE(f"plain_{plan.size}", layout, DEFAULT_FORMAT)
    secured = FedMoE(f"tls_{plan.size}", layout, DEFAULT_FORMAT, tls=True)
    with plain, secured:
        samples = take_turns([plain, secured], rounds=plan.rounds, seconds=plan.seconds)
    rates = {name: [turn.per_s for turn in turns] for name, turns in samples.items()}
    costs = {name: [turn.cpu_ms() for turn in turns] for name, turns in samples.items()}
    for name in samples:
        yield figure(f"{name}_updates_per_s", rates[name], "updates/s")
        yield figure(f"{name}_cpu_ms", costs[name], "ms/update")
    yield ratio("tls_vs_plain", rates[secured.name], rates[plain.name])
    yield ratio("tls_vs_plain_cpu", costs[secured.name], costs[plain.name])
