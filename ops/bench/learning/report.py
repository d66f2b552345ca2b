"""The table, the figures and the plot of kept outcomes. Pure, but for the plot's file.

The share of a model is the part of perfect routing's gain that it reaches, in the same seed and with the same workers:
(base − model) / (base − own experts), of losses averaged over the domains.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedmoe.protocol.rules import ADAPTIVE, BY_WORKER, NESTEROV
from fedmoe.tools.routing import BY_VECTORS
from ops.bench.learning.carry import BASE, OPTED_OUT, OVER, OWN, Outcome
from ops.bench.learning.lab import FITTED, FIXED, MERGED
from ops.bench.learning.runs import BLOCKS, GATEWAY, ONE_PASS, SYNC_S, Run
from ops.bench.plan import NEW_GATEWAY
from ops.bench.result import Result, figure

Group = tuple[str, int, int, int]


@dataclass(slots=True)
class Line:
    """One model of one kind of run: what it was trained with, and its mean held-out loss and share for each seed."""

    group: Group
    label: str
    gateway_steps: int  # of all workers together
    all_steps: int  # a pass that trains two adapters is one
    loss: dict[int, float] = field(default_factory=dict)
    share: dict[int, float] = field(default_factory=dict)


def label_of(run: Run, model: str) -> str:
    """How the table calls a model of a run."""
    if run.wire_format != "int4":
        return f"{label_of(replace(run, wire_format='int4'), model)}, {run.wire_format}"
    if run.scheme == "apart":
        return model if run.gain == 1 or model == BASE else f"{model}, gain {run.gain:g}"
    if run.scheme == "central":
        return "centralised"
    if run.scheme == "rounds":
        return f"gateway, in rounds of {run.sync_s:g} steps, gain {run.gain:g}"
    if run.scheme == "real":
        return f"gateway in real processes, every {run.sync_s:g} s, gain {run.gain:g}"
    if run.scheme == BLOCKS:
        return {OWN: "each block alone, on its own domain"}.get(model, model)
    what = {GATEWAY: "gateway", OWN: "experts", OVER: "experts over gateway"}.get(model, "gateway")
    if run.scheme == "gateway":
        more = ", domains alike" if run.balance != BY_WORKER else ""
        more += f", sync {run.sync_s:g} s" if run.sync_s != SYNC_S else ""
        more += {NESTEROV: f", nesterov {run.momentum:g}", ADAPTIVE: f", adaptive lr {run.lr:g}"}.get(
            run.optimizer, ""
        )
        if model == OPTED_OUT:
            return f"gateway, replayed without {run.without}, gain {run.gain:g}{more}"
        return f"gateway, all train it, gain {run.gain:g}{more}"
    return f"{what} by {run.scheme}, gain {run.gain:g}, compute × {run.compute:g}"


def lines_of(found: Iterable[tuple[Run, Outcome]]) -> list[Line]:
    """One line for each group and label, its seeds together, in the order in which they were found."""
    pairs = list(found)
    ends = _ends(pairs)
    lines: dict[tuple[Group, str], Line] = {}
    for run, outcome in pairs:
        for model, losses in outcome.losses.items():
            label, loss = label_of(run, model), statistics.fmean(losses.values())
            of_gateway, of_all = outcome.steps.get(GATEWAY, 0), sum(outcome.steps.values())
            steps = of_gateway, of_gateway if run.scheme == ONE_PASS else of_all
            if model == BASE:
                steps = 0, 0
            line = lines.setdefault((run.group, label), Line(run.group, label, *steps))
            line.loss[run.seed] = loss
            if (end := ends.get((run.group, run.seed))) and end[0] > end[1]:
                line.share[run.seed] = (end[0] - loss) / (end[0] - end[1])
    return list(lines.values())


def _ends(found: Sequence[tuple[Run, Outcome]]) -> dict[tuple[Group, int], tuple[float, float]]:
    """The losses of base and perfect routing; of several trainings of the experts apart, the best counts."""
    ends: dict[tuple[Group, int], tuple[float, float]] = {}
    for run, outcome in found:
        if run.scheme == "apart":
            base, own = (statistics.fmean(outcome.losses[model].values()) for model in (BASE, OWN))
            before = ends.get((run.group, run.seed), (base, own))
            ends[run.group, run.seed] = base, min(own, before[1])
    return ends


def table(lines: Iterable[Line]) -> str:
    """The lines as aligned text, a block for each group; the seeds are named, as not each model has the same ones."""
    blocks: dict[Group, list[Line]] = defaultdict(list)
    for line in lines:
        blocks[line.group].append(line)
    text = []
    for (mix, steps, rank, rows), block in blocks.items():
        text.append(
            f"workers: {mix}, {steps} steps a domain, rank {rank}, up to {rows} held-out rows a domain"
        )
        width = max(len(line.label) for line in block)
        text.append(f"  {'':<{width}}  gateway steps  all steps    loss   share  least .. most   seeds")
        for line in block:
            loss = statistics.fmean(line.loss.values())
            share, spread = "", ""
            if line.share:
                values = [100 * share for share in line.share.values()]
                share = f"{statistics.fmean(values):.1f} %"
                spread = f"{min(values):.1f} .. {max(values):.1f}" if len(values) > 1 else ""
            text.append(
                f"  {line.label:<{width}}  {line.gateway_steps:>13}  {line.all_steps:>9}  {loss:6.3f}"
                f" {share:>7}  {spread:<14}  {' '.join(map(str, sorted(line.loss)))}"
            )
    return "\n".join(text)


def figures(lines: Iterable[Line], *, short: bool) -> Iterator[Result]:
    """A result for every line; then the figures with a bar, of three workers, a domain each."""
    lines = list(lines)
    for line in lines:
        mix, steps, rank, rows = line.group
        label = line.label.replace("×", "x").replace(",", "").replace(" ", "_")
        name = f"learning_{mix}_{steps}_r{rank}_n{rows}_{label}"
        yield _mean(f"{name}_loss", list(line.loss.values()), "nats/token")
        if line.share:
            yield _mean(f"{name}_share", list(line.share.values()), "of perfect")
    mark, done = "learning_short" if short else "learning", set[str]()
    with_bars = {line.group for line in lines if line.group[:3] == ("three", 48, 8)}
    for group in sorted(with_bars, key=lambda group: -group[3]):  # of a figure, that on the most rows
        for result in _bars({line.label: line.share for line in lines if line.group == group}, mark):
            if result.name not in done:
                done.add(result.name)
                yield result


def _bars(block: Mapping[str, Mapping[int, float]], mark: str) -> Iterator[Result]:
    """The figures with a bar of one group, whose shares these are: label → seed → share."""
    if fitted := block.get(FITTED):
        yield _least(f"{mark}_fitted_above_fixed_points", _above(fitted, block, FIXED), "points")
    gain, sync_s = NEW_GATEWAY.aggregation.gain, NEW_GATEWAY.sync_interval_s
    for name, label in (
        ("gateway", f"gateway, all train it, gain {gain:g}"),
        ("real", f"gateway in real processes, every {sync_s:g} s, gain {gain:g}"),
    ):
        if not (trained := block.get(label)):
            continue
        yield _mean(f"{mark}_{name}_share", list(trained.values()), "of perfect")
        yield figure(f"{mark}_{name}_least_share", [min(trained.values())], "of perfect")
        if above := _above(trained, block, MERGED):
            yield _mean(f"{mark}_{name}_above_merged_points", above, "points")
    if routed := block.get(BY_VECTORS):
        yield _mean(f"{mark}_routed_share", list(routed.values()), "of perfect")


def _above(
    one: Mapping[int, float], block: Mapping[str, Mapping[int, float]], others: Iterable[str]
) -> list[float]:
    """Percentage points between a model and that of the others which is best on the test rows, of seeds with both."""
    best = {
        seed: max(found)
        for seed in one
        if (found := [block[name][seed] for name in others if seed in block.get(name, {})])
    }
    return [100 * (one[seed] - share) for seed, share in best.items()]


def _least(name: str, values: Sequence[float], unit: str) -> Result:
    return figure(name, values, unit, value=min(values))


def _mean(name: str, values: Sequence[float], unit: str) -> Result:
    return figure(name, values, unit, value=statistics.fmean(values))


def plot(file: Path, lines: Sequence[Line]) -> None:
    """Write the shares as bars, a panel for each group, into one PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [line for line in lines if line.share and line.label != BASE]
    groups = list(dict.fromkeys(line.group for line in shown))
    if not groups:
        return
    heights = [1 + sum(line.group == group for line in shown) for group in groups]
    canvas, panels = plt.subplots(
        len(groups),
        1,
        figsize=(9, 0.35 * sum(heights) + 0.6 * len(groups)),
        height_ratios=heights,
        squeeze=False,
    )
    for (panel,), group in zip(panels, groups, strict=True):
        block = [line for line in shown if line.group == group][::-1]
        means = [100 * statistics.fmean(line.share.values()) for line in block]
        panel.barh([line.label for line in block], means, color="#7a9cc6")
        for place, line in enumerate(block):
            panel.plot(
                [100 * share for share in line.share.values()], [place] * len(line.share), "k.", markersize=4
            )
        panel.axvline(100, color="black", linewidth=0.8)
        panel.set(title="{}, {} steps a domain, rank {}".format(*group), xlim=(40, 110))
        panel.grid(axis="x", alpha=0.3)
    panels[-1][0].set_xlabel("% of perfect routing's gain, mean; a dot for each seed")
    canvas.tight_layout()
    canvas.savefig(file, dpi=110)
    plt.close(canvas)
