"""Bytes on the wire, as the server counts them: of a publication, and of a pull of the whole expert."""

import subprocess
from collections.abc import Callable, Iterator

from fedmoe.protocol.formats import FORMATS
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from ops.bench.adapters import LAYOUTS, fp32_bytes
from ops.bench.fedmoe_side import DEFAULT_FORMAT, Client, aggregator_command, create_expert, make_spec
from ops.bench.plan import Plan
from ops.bench.processes import BenchError, Processes
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
    with Processes(f"wire_{form}") as processes:
        url = processes.redis()
        create_expert(url, EXPERT, make_spec(layout, form))
        client = Client(url, EXPERT, "worker")
        meter = Connection(RedisSettings(url=url)).client

        def moved(direction: str, what: Callable[[], object]) -> int:
            before = meter.info("stats")
            what()
            return int(meter.info("stats")[direction] - before[direction])

        client.train()
        update = client.make_update()
        pushed = [moved("total_net_input_bytes", lambda: client.publish(update)) for _ in range(UPDATES)]
        once = subprocess.run(aggregator_command(url, [EXPERT], "--burst"), capture_output=True, check=False)
        if once.returncode or client.store.meta().version != 1:
            raise BenchError(f"the aggregator did not apply the update: {once.stderr.decode()[-300:]}")
        pulled = [
            moved("total_net_output_bytes", lambda: client.store.pull(client.spec, known=""))
            for _ in range(UPDATES)
        ]
    n_bytes = fp32_bytes(layout)
    return [n / n_bytes for n in pushed], [n / n_bytes for n in pulled]
