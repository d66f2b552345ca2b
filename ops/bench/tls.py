"""Updates a second over TLS and over plain TCP, in turns: what encryption costs. Needs a server with TLS."""

from collections.abc import Iterator

from ops.bench.adapters import LAYOUTS
from ops.bench.contest import side_by_side
from ops.bench.fedmoe_side import DEFAULT_FORMAT, FedMoE
from ops.bench.plan import Plan
from ops.bench.result import Result


def run(plan: Plan) -> Iterator[Result]:
    """Both in the default format, and the ratio of their rates and of their CPU."""
    layout = LAYOUTS[plan.size]
    plain = FedMoE(f"plain_{plan.size}", layout, DEFAULT_FORMAT)
    secured = FedMoE(f"tls_{plan.size}", layout, DEFAULT_FORMAT, tls=True)
    with plain, secured:
        yield from side_by_side(
            secured,
            plain,
            rounds=plan.rounds,
            seconds=plan.seconds,
            rates="tls_vs_plain",
            costs="tls_vs_plain_cpu",
        )
