"""Bytes on the wire, as the server counts them: of a publication, and of a pull of the whole expert."""

from collections.abc import Iterator

from fedmoe.codec import FORMATS
from fedmoe.store.connection import Connection, RedisSettings
from ops.bench.adapters import LAYOUTS, fp32_bytes
from ops.bench.fedmoe_side import DEFAULT_FORMAT, Client, create_expert, make_spec
from ops.bench.plan import Plan
from ops.bench.processes import Processes
from ops.bench.result import Result, figure

UPDATES = 5
EXPERT = "expert"


def run(plan: Plan) -> Iterator[Result]:
    """Every format there is, relative to the bytes of the adapter's values in fp32."""
    pushed: dict[str, list[float]] = {}
    for form in FORMATS:
        pushed[form], pulled = _count(plan, form)
        yield figure(f"wire_push_{form}_vs_fp32", pushed[form], "x")
        yield figure(f"wire_pull_{form}_vs_fp32", pulled, "x")
    yield figure("wire_bytes_default_vs_fp32", pushed[DEFAULT_FORMAT], "x")
    if "int4" in pushed:
        yield figure("wire_bytes_int4_vs_fp32", pushed["int4"], "x")
    else:
        print("note: there is no wire format int4, so wire_bytes_int4_vs_fp32 is missing")


def _count(plan: Plan, form: str) -> tuple[list[float], list[float]]:
    """Bytes in of five publications, and out of five pulls; nobody else uses the server, no aggregator either."""
    layout = LAYOUTS[plan.size]
    pushed, pulled = [], []
    with Processes(f"wire_{form}") as processes:
        url = processes.redis()
        create_expert(url, EXPERT, make_spec(layout, form))
        client = Client(url, EXPERT, "worker")
        meter = Connection(RedisSettings(url=url)).client
        for _ in range(UPDATES):
            client.train()
            update = client.cut()
            before = meter.info("stats")
            client.publish(update)
            between = meter.info("stats")
            client.store.pull(known="")
            after = meter.info("stats")
            pushed.append(between["total_net_input_bytes"] - before["total_net_input_bytes"])
            pulled.append(after["total_net_output_bytes"] - between["total_net_output_bytes"])
    n_bytes = fp32_bytes(layout)
    return [n / n_bytes for n in pushed], [n / n_bytes for n in pulled]
