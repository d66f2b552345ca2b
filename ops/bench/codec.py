"""What is done with an update besides moving it: CPU time, and bytes that torch reads and writes for each of its bytes.

Each step takes turns with the compiled kernels and with torch alone (`torch_vs_compiled` is the ratio of their times).
What torch alone moves is in `moved`.

One process, one thread, no Redis, the real code: `make` (the worker's progress, encoded and hashed), `fold` (the
aggregator's check, decoding and folding), `pull` (decoded, the books settled, the adapter corrected) and `pack` (what
workers pull, encoded). Their sum is the arithmetic of an update that is a batch of its own: no transport can be so fast
that a core makes more updates a second. Copies that torch does not see (parts joined, packed weights wrapped and
unwrapped) are in the time, not in `moved`. `threads_vs_one` is the ratio of the seconds of a large adapter's fold and
pack, with one thread for each core and with one.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from consumers.decide import Admission
from consumers.payload import Workspace, fold_payload
from fedmoe.protocol import formats
from fedmoe.protocol.codec import scratch_values
from fedmoe.protocol.fold import Values
from fedmoe.protocol.formats import EXACT
from fedmoe.protocol.layout import AdapterBuffer, Layout, values_of_chunks
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.packed import chunks, pack, pack_to, packed_bytes, unpack
from fedmoe.protocol.records import Decided, Meta
from fedmoe.protocol.rules import AggregationRules
from fedmoe.protocol.server import ServerStep
from fedmoe.protocol.update import make_run
from fedmoe.store.chunks import values_and_stamp, weights_reads
from fedmoe.util.memory import keep_freed
from fedmoe.util.threads import ALONE, Threads, n_cores
from ops.bench.adapters import LAYOUTS, fp32_bytes
from ops.bench.fedmoe_side import FINGERPRINT, STEP, make_spec
from ops.bench.plan import Plan
from ops.bench.processes import BenchError
from ops.bench.result import Result, figure, ratio
from producers.ledger import Ledger, Trained

COMMIT = "0" * 16
TURNS = 20  # of every step in a round


class Moved(TorchDispatchMode):
    """Counts the bytes of all tensors that torch's operations read or write; one changed in place counts once."""

    n_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not str(func).startswith("aten.empty"):
            tensors = [v for v in (*args, *(kwargs or {}).values(), result) if isinstance(v, torch.Tensor)]
            # What is changed in place, or given as `out`, is also the result.
            self.n_bytes += sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors}.values())
        return result


def run(plan: Plan) -> Iterator[Result]:
    """Every format of the plan."""
    keep_freed(blocks_mib=32, free_mib=64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for form in plan.formats:
            yield from _measure(plan, LAYOUTS[plan.size], form)
        yield from _with_threads(plan, LAYOUTS[plan.large], plan.formats[-1])
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _by_torch() -> Iterator[None]:
    """Without the compiled kernels."""
    with mock.patch.object(formats, "compiled", return_value=None):
        yield


def _cpu_ms(step: Callable[[], object]) -> float:
    began = time.process_time()
    for _ in range(TURNS):
        step()
    return (time.process_time() - began) * 1000 / TURNS


def _measure(plan: Plan, layout: Layout, form: str) -> Iterator[Result]:
    if formats.compiled() is None:
        raise BenchError("the kernels cannot be compiled here: install gcc")
    steps = _steps(layout, form)
    ms: dict[str, list[float]] = {name: [] for name in steps}
    torchs: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(plan.rounds + 1):
        for name, step in steps.items():
            ms[name].append(_cpu_ms(step))
            with _by_torch():
                torchs[name].append(_cpu_ms(step))
    for name, step in steps.items():
        yield figure(f"codec_{form}_{name}_cpu_ms", ms[name][1:], "ms/update")  # the first round warms up
        yield ratio(f"codec_{form}_{name}_torch_vs_compiled", torchs[name][1:], ms[name][1:])
        with _by_torch(), Moved() as moved:
            step()
        yield figure(f"codec_{form}_{name}_moved", [moved.n_bytes / fp32_bytes(layout)], "x of fp32")
    yield figure(
        f"codec_{form}_cpu_ms", [sum(turns) for turns in zip(*ms.values(), strict=True)][1:], "ms/update"
    )


def _with_threads(plan: Plan, layout: Layout, form: str) -> Iterator[Result]:
    """Wall time, because threads cannot save CPU time."""
    s: dict[str, list[list[float]]] = {"fold": [[], []], "pack": [[], []]}
    with ThreadPoolExecutor(n_cores()) as pool:
        contestants = [_steps(layout, form, threads) for threads in (ALONE, Threads(pool, n_cores()))]
        for _ in range(plan.rounds + 1):
            for name, both in s.items():
                for steps, seconds in zip(contestants, both, strict=True):
                    began = time.perf_counter()
                    steps[name]()
                    seconds.append(time.perf_counter() - began)
    for name, (one, many) in s.items():
        yield figure(f"codec_{form}_{plan.large}_{name}_ms", [1000 * t for t in one[1:]], "ms/update")
        yield ratio(f"codec_{form}_{plan.large}_{name}_threads_vs_one", many[1:], one[1:])


def _steps(layout: Layout, form: str, threads: Threads = ALONE) -> dict[str, Callable[[], object]]:
    """The steps of an update, each on what the ones before it left."""
    spec = make_spec(layout, form)
    meta = Meta(
        lineage="0" * 16, commit="0", weights_commit="0", spec=spec.digest, base_fingerprint=FINGERPRINT
    )
    weights, folded = AdapterBuffer(layout), AdapterBuffer(layout)
    weights.flat.copy_(initial_weights(layout, spec.init_seed))
    local = weights.flat + torch.randn(layout.numel, generator=torch.Generator().manual_seed(0)) * STEP
    ledger = Ledger(base=weights.flat.clone(), meta=meta, run=make_run(1, "00000001"))
    spares, none = ledger.spares, torch.empty(0)
    space = Workspace(
        Values(weights.flat, none),
        Values(folded.flat, none),
        torch.empty(scratch_values(layout.numel)),
        threads,
    )
    admission = Admission(0, ServerStep(AggregationRules(), 1.0))

    def make() -> object:
        ledger.queue.clear()
        return ledger.make_update(ledger.cut(local, form), Trained(steps=1), fingerprint=FINGERPRINT)

    update = ledger.make_update(ledger.cut(local, form), Trained(steps=1), fingerprint=FINGERPRINT)

    def fold() -> object:
        return fold_payload(update.header, admission, update.parts, spec, space)

    fold()
    whole = b"" if form == EXACT else pack(folded.flat, spec, COMMIT)
    packed = [] if form == EXACT else [whole[first : last + 1] for first, last in chunks(spec)]
    replies = [
        len(folded.file) if command == "strlen" else bytes(folded.file[place[0] : place[1] + 1])
        for command, _, *place in weights_reads("", layout)
    ]

    def pull() -> None:
        if form == EXACT:
            found = values_and_stamp(layout, replies)
            pulled = values_of_chunks(layout, found[0] if found else (), spares.take())
        else:
            pulled = unpack(packed, spec, COMMIT, spares.take())
        ledger.start, ledger.kept, ledger.queue = None, [], [update]
        change = ledger.observe(meta, pulled, Decided(id=update.id, how="applied", version=1), now=0.0)
        local.add_(change.correction)
        spares.give(change.correction)

    steps: dict[str, Callable[[], object]] = {"make": make, "fold": fold, "pull": pull}
    if form != EXACT:
        content = memoryview(bytearray(packed_bytes(spec)))
        steps["pack"] = lambda: pack_to(content, folded.flat, spec, COMMIT, threads)
    return steps
