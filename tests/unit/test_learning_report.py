"""ops.bench.learning.report and the files of kept runs: shares, figures with a bar, table and plot."""

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fedmoe.tools.routing import BY_ARROW, BY_VECTORS
from ops.bench.learning.carry import BASE, OWN, Outcome, kept, outcomes, write
from ops.bench.learning.lab import FITTED, FITTED_GROUPS, MERGED
from ops.bench.learning.report import figures, lines_of, plot, table
from ops.bench.learning.runs import DOMAINS, GATEWAY, Run
from ops.bench.plan import NEW_GATEWAY
from ops.bench.result import BARS, Result

MEASURED = Path(__file__).parents[2] / "ops" / "bench" / "learning" / "measured"


def outcome(run: Run, **means: float) -> Outcome:
    losses = {name.replace("_", " "): dict.fromkeys(DOMAINS, mean) for name, mean in means.items()}
    fields = asdict(run) | {"delay_s": list(run.delay_s)}
    return Outcome(
        run=fields, losses=losses, steps={GATEWAY: 144}, updates={}, staleness={}, seconds=1.0, cpu_s=1.0,
        precision="float32", valid={}, curve=[],
    )  # fmt: skip


def some() -> list[tuple[Run, Outcome]]:
    pairs = []
    for seed, own in ((0, 1.0), (1, 1.2)):
        apart = Run(scheme="apart", seed=seed)
        merged = dict.fromkeys((*MERGED, BY_VECTORS, BY_ARROW), 1.6)
        merged |= {"cat 1.8": 1.5, "svd 1.8": 1.55, FITTED: 1.5 - seed / 10}
        pairs.append((apart, outcome(apart, **{BASE: 2.0, OWN.replace(" ", "_"): own, **merged})))
        trained = Run(scheme="gateway", gain=2.0, seed=seed)
        pairs.append((trained, outcome(trained, gateway=own + 0.01)))
    return pairs


def test_shares_are_of_the_same_seed_s_perfect_routing() -> None:
    lines = {line.label: line for line in lines_of(some())}
    assert lines["own experts"].share == {0: 1.0, 1: 1.0}
    assert lines["base"].share == {0: 0.0, 1: 0.0}
    assert lines["gateway, all train it, gain 2"].share == pytest.approx({0: 0.99, 1: 0.79 / 0.8})
    found = {result.name: result for result in figures(list(lines.values()), short=False)}
    assert found["learning_gateway_share"].value == pytest.approx(0.98875)
    assert found["learning_gateway_share"].bar is None  # the bar is for real processes
    above = found["learning_gateway_above_merged_points"]
    assert above.value == pytest.approx(100 * (0.98875 - (0.5 + 0.75) / 2))
    fitted = found["learning_fitted_above_fixed_points"]
    assert (fitted.value, fitted.max, fitted.met) == (0.0, pytest.approx(12.5), True)
    assert found["learning_gateway_least_share"].value == pytest.approx(0.9875)
    assert "98.9 %  98.8 .. 99.0" in table(list(lines.values()))


def test_outcomes_are_kept_and_not_repeated(tmp_path: Path) -> None:
    for run, one in some():
        write(tmp_path / f"{run.name}.json", one)
    (tmp_path / "broken.json").write_text("{")
    (_, odd), *_ = some()
    write(tmp_path / "later.json", replace(odd, run=odd.run | {"a_later_field": 1}))
    assert [run for run, _ in kept(tmp_path)] == sorted(
        (r for r, _ in some()), key=lambda r: (r.scheme, r.seed)
    )
    reports: list[str] = []
    report: Callable[[str], None] = reports.append
    assert list(outcomes([run for run, _ in some()], tmp_path, report=report)) == some()
    assert not reports
    (first, one), *_ = some()
    earlier = {name: value for name, value in one.run.items() if name != "trace"}  # a field that came later
    write(tmp_path / f"{first.name}.json", replace(one, run=earlier))
    assert [run for run, _ in outcomes([first], tmp_path, report=report)] == [first]
    assert not reports
    plain = replace(first, merges=False)
    assert [one for _, one in outcomes([plain], tmp_path, report=report)] == [replace(one, run=earlier)]
    os.replace(tmp_path / f"{first.name}.json", tmp_path / "another-name.json")
    assert [run for run, _ in outcomes([first, plain], tmp_path, report=report)] == [first, plain]
    assert not reports
    plot(tmp_path / "plot.png", lines_of(some()))
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_a_model_that_some_kept_outcomes_lack_is_said(tmp_path: Path) -> None:
    """Nothing is trained again for it; the table says which seeds each model has."""
    pairs = some()
    (first, one), *_ = pairs
    earlier = replace(one, losses={name: loss for name, loss in one.losses.items() if name != FITTED_GROUPS})
    pairs[0] = first, earlier
    for run, each in pairs:
        write(tmp_path / f"{run.name}.json", each)
    reports: list[str] = []
    assert list(outcomes([run for run, _ in pairs], tmp_path, report=reports.append)) == pairs
    assert reports == [f"    {first.name}: kept without {FITTED_GROUPS}; to measure them, remove its file"]
    plain = replace(first, merges=False)
    assert [one for _, one in outcomes([plain], tmp_path, report=reports.append)] == [earlier]
    assert len(reports) == 1
    seeds = [
        line.rpartition("  ")[2]
        for line in table(lines_of(pairs)).splitlines()
        if line.startswith(f"  {FITTED}")
    ]
    assert seeds == ["0 1", "1"]


def with_losses(run: Run, **means: float) -> tuple[Run, Outcome]:
    """An outcome of models whose names have `_` for a space."""
    return run, outcome(run, **means)


def figures_of(found: Iterable[tuple[Run, Outcome]], *, short: bool = False) -> dict[str, Result]:
    made = list(figures(lines_of(found), short=short))
    assert len({one.name for one in made}) == len(made)
    return {one.name: one for one in made}


ENDS = {"base": 2.0, "own_experts": 1.0}


def real(rows: int, sync_s: float, loss: float, seed: int = 0) -> tuple[Run, Outcome]:
    rules = NEW_GATEWAY.aggregation
    run = Run(scheme="real", gain=rules.gain, balance=rules.balance, sync_s=sync_s, rows=rows, seed=seed)
    return with_losses(run, gateway=loss)


def test_the_real_gateway_s_bars_are_for_the_interval_of_a_new_one() -> None:
    """Points above the best merge are given only where merges were measured with the same seed and rows."""
    default = NEW_GATEWAY.sync_interval_s
    plain = Run(scheme="apart", merges=False, rows=16)
    pairs = [with_losses(plain, **ENDS), real(16, default, 1.1), real(16, default / 4, 1.0)]
    found = figures_of(pairs)
    assert found["learning_real_share"].value == pytest.approx(0.9)
    assert found["learning_real_least_share"].met is False
    assert "learning_real_above_merged_points" not in found
    merged = Run(scheme="apart", rows=16, seed=1)
    pairs += [
        with_losses(merged, **ENDS, **{"cat_1.8": 1.3, "svd_1.8": 1.25, FITTED.replace(" ", "_"): 1.4}),
        real(16, default, 1.05, seed=1),
    ]
    found = figures_of(pairs)
    assert found["learning_real_share"].value == pytest.approx(0.925)
    above = found["learning_real_above_merged_points"]
    assert (above.value, above.n) == (pytest.approx(20), 1)
    groups = with_losses(merged, **ENDS, **{"cat_1.8": 1.3, FITTED_GROUPS.replace(" ", "_"): 1.2})
    assert figures_of([groups, pairs[-1]])["learning_real_above_merged_points"].value == pytest.approx(15)


def test_figures_with_a_bar_are_of_the_most_held_out_rows() -> None:
    default = NEW_GATEWAY.sync_interval_s
    pairs = [real(16, default, 1.5), real(128, default, 1.02)]
    pairs += [with_losses(Run(scheme="apart", merges=False, rows=rows), **ENDS) for rows in (16, 128)]
    for order in (pairs, pairs[::-1]):
        assert figures_of(order)["learning_real_share"].value == pytest.approx(0.98)


@pytest.mark.parametrize("short", [False, True])
def test_every_bar_of_the_learning_benchmark_has_a_figure(short: bool) -> None:
    """That of the time to a loss is in test_learning_times.py."""
    merges = {"cat_1": 1.6, "cat_1.8": 1.5, FITTED.replace(" ", "_"): 1.4, BY_VECTORS.replace(" ", "_"): 1.0}
    found = figures_of(
        [
            with_losses(Run(scheme="apart"), **ENDS, **merges),
            with_losses(Run(scheme="gateway", gain=NEW_GATEWAY.aggregation.gain), gateway=1.0),
            real(128, NEW_GATEWAY.sync_interval_s, 1.0),
        ],
        short=short,
    )
    wanted = {
        name
        for name in BARS
        if name.startswith("learning_") and "_time_" not in name and ("_short_" in name) == short
    }
    assert wanted <= found.keys()
    assert all(found[name].met for name in wanted)


def test_the_kept_runs_of_the_repository_have_their_own_names() -> None:
    found = kept(MEASURED)
    files = {file.name for file in MEASURED.glob("*.json") if not file.name.startswith("race-")}
    assert {f"{run.name}.json" for run, _ in found} == files
    assert len({run for run, _ in found}) == len(found) > 0
