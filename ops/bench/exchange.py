"""What an exchange costs a worker, stage by stage: CPU ms, and pages of memory that the kernel gave it.

    bash ops/bench.sh --quick --only exchange

The worker is the client of `fedmoe_side`, in a process of its own and alone with an aggregator.
"""

import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import producers.pull
from fedmoe.store.worker import WorkerStore
from ops.bench.adapters import LAYOUTS
from ops.bench.fedmoe_side import (
    DEFAULT_FORMAT,
    FINGERPRINT,
    Client,
    aggregator_command,
    create_expert,
    make_spec,
)
from ops.bench.plan import Plan
from ops.bench.processes import CONTEXT, Processes
from ops.bench.result import Result, figure
from producers.ledger import Ledger
from producers.spares import Spares

EXPERT = "expert"
WARM = 4  # exchanges that do not count
N = 12  # that do
STAGES: dict[str, tuple[Any, str]] = {
    "copy": (Spares, "copy"),
    "cut": (Ledger, "cut"),
    "hash": (Ledger, "make_update"),
    "publish": (WorkerStore, "publish"),
    "poll": (WorkerStore, "poll"),
    "receive": (WorkerStore, "pull"),
    "unpack": (producers.pull, "unpack"),
    "settle": (Ledger, "observe"),
}


class _Meter:
    """CPU ms and pages that calls spent, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, measured under this name."""

        def measured(*arguments: Any, **options: Any) -> Any:
            began, had = time.thread_time(), _pages()
            try:
                return call(*arguments, **options)
            finally:
                spent = self.spent.setdefault(name, [0.0, 0.0])
                spent[0] += (time.thread_time() - began) * 1000
                spent[1] += _pages() - had

        return measured


def _pages() -> float:
    return float(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt)


def work(pipe: Any, url: str) -> None:
    """Body of the worker's process: sends what N exchanges spent, by stage."""
    client, meter = Client(url, EXPERT, "worker"), _Meter()
    _exchange(client, WARM)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of its memory is measured from now on
    for name, (owner, attribute) in STAGES.items():
        setattr(owner, attribute, meter.around(name, getattr(owner, attribute)))
    meter.around("all", _exchange)(client, N)
    pipe.send(meter.spent)
    time.sleep(3600)


def _exchange(client: Client, n: int) -> None:
    while n:
        n -= client.turn()
        time.sleep(max(0.0, client.next_at - time.monotonic()))


def run(plan: Plan) -> Iterator[Result]:
    """Each stage, for both sizes."""
    for size in dict.fromkeys((plan.size, plan.large)):
        with Processes(f"exchange_{size}") as processes:
            url = processes.redis()
            create_expert(url, EXPERT, make_spec(LAYOUTS[size], DEFAULT_FORMAT), fingerprint=FINGERPRINT)
            processes.command("aggregator", *aggregator_command(url, [EXPERT]))
            mine, theirs = CONTEXT.Pipe()
            processes.call("worker", work, theirs, url)
            processes.until("the exchanges", mine.poll, timeout_s=300.0)
            spent, peak = mine.recv(), processes.peak_rss_mib()["worker"]
        for name, (ms, pages) in spent.items():
            yield figure(f"exchange_{size}_cpu_ms_{name}", [ms / N], "ms/update")
            yield figure(f"exchange_{size}_pages_{name}", [pages / N], "pages/update")
        yield figure(f"exchange_{size}_peak_rss_mib", [peak], "MiB")
