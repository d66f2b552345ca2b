"""Updates a second, and the time of one, with three clients that push and pull: FedMoE, raw Redis, HTTP coordinator."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from fedmoe.protocol.codec import part_lengths
from fedmoe.protocol.formats import EXACT
from fedmoe.protocol.layout import Layout
from ops.bench.adapters import LAYOUTS, fp32_bytes
from ops.bench.contest import Contestant, Sample, take_turns
from ops.bench.fedmoe_side import DEFAULT_FORMAT, FedMoE
from ops.bench.http_side import Http
from ops.bench.plan import Plan
from ops.bench.raw_side import Raw
from ops.bench.result import Result, figure, percentiles, ratio


def run(plan: Plan) -> Iterator[Result]:
    """All sizes, with and without the append-only file; the ratios that have a bar at `plan.size` without it."""
    for size in (plan.size, *plan.other_sizes):
        for aof in plan.aof:
            yield from _contest(plan, size, aof)


def _contest(plan: Plan, size: str, aof: bool) -> Iterator[Result]:
    layout = LAYOUTS[size]
    where = f"{size}_aof" if aof else size
    fedmoe = {form: FedMoE(f"fedmoe_{form}_{where}", layout, form, aof=aof) for form in plan.formats}
    raw = Raw(f"raw_fp32_{where}", fp32_bytes(layout), aof=aof)
    http = None if aof else Http(f"http_{where}", layout)
    besides = _other_raws(plan, layout, where) if size == plan.size and not aof else []
    contestants: list[Contestant] = [*fedmoe.values(), raw, *besides, *([http] if http else [])]
    with ExitStack() as stack:
        for contestant in contestants:
            stack.enter_context(contestant)
        samples = take_turns(contestants, rounds=plan.rounds, seconds=plan.seconds)
        peaks = {contestant.name: contestant.processes.peak_rss_mib() for contestant in contestants}
    for name, turns in samples.items():
        yield from _describe(name, turns, fp32_bytes(layout))
        for role, mib in peaks[name].items():
            yield figure(f"{name}_peak_rss_mib_{role}", [mib], "MiB")
    if size == plan.size and not aof:
        rates = {name: [turn.per_s for turn in turns] for name, turns in samples.items()}
        yield ratio("fp32_vs_raw", rates[fedmoe["fp32"].name], rates[raw.name])
        yield ratio("default_vs_raw_fp32", rates[fedmoe[DEFAULT_FORMAT].name], rates[raw.name])
        if http:
            ours, theirs = fedmoe[DEFAULT_FORMAT].name, http.name
            yield ratio("updates_vs_http", rates[ours], rates[theirs])
            spent = {name: [turn.cpu_ms() for turn in samples[name]] for name in (ours, theirs)}
            yield ratio("cpu_vs_http", spent[ours], spent[theirs])


def _other_raws(plan: Plan, layout: Layout, where: str) -> list[Raw]:
    """The bytes of the other formats; and those of fp32, with weights in chunks, as FedMoE writes and reads them."""
    if not plan.raw_besides:
        return []
    packed = {form: sum(part_lengths(layout.numel, form)) for form in plan.formats if form != EXACT}
    return [
        *(Raw(f"raw_{form}_{where}", n_bytes) for form, n_bytes in packed.items()),
        Raw(f"raw_fp32_chunks_{where}", fp32_bytes(layout), in_chunks=True),
    ]


def _describe(name: str, turns: Sequence[Sample], n_bytes: int) -> Iterator[Result]:
    yield figure(f"{name}_updates_per_s", [turn.per_s for turn in turns], "updates/s")
    yield figure(f"{name}_mb_per_s", [turn.per_s * n_bytes / 1e6 for turn in turns], "MB/s of fp32")
    for role in turns[0].cpu_s:
        yield figure(f"{name}_cpu_ms_{role}", [turn.cpu_ms(role) for turn in turns], "ms/update")
    yield figure(f"{name}_cpu_ms", [turn.cpu_ms() for turn in turns], "ms/update")
    yield from percentiles(f"{name}_push_to_pulled", [s * 1000 for turn in turns for s in turn.update_s])
