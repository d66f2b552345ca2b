"""The race of `ops.bench.race`: our side of it, with a tiny model. Flower's needs an environment of its own.

And a run of `ops.bench.learning` in real processes.
"""

import json
import time
from array import array
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmoe.data.encode import Answer, Example
from fedmoe.demo.corpus_rows import Row
from fedmoe.model.adapter import adapter_layout
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.rules import BY_WORKER, TrainingSettings
from ops.bench.learning.real import play_real
from ops.bench.learning.runs import Run
from ops.bench.learning.times import reached
from ops.bench.race import Arrival, Course, arrival_of, losses_until, race_figures
from ops.bench.race_fedmoe import run_fedmoe
from ops.bench.race_kept import Curve, kept_races, read, write
from ops.bench.race_seat import Seat, Setup, Snapshot, prepare
from tests.tiny import save_tiny_model, tiny_config


def made(tmp_path: Path, **changes: object) -> tuple[Path, Setup, dict[str, list[Example]]]:
    rows = {
        "sql_expert": [Example(array("i", range(1, 8 + 1)), (Answer(2, 5, 0.5), Answer(6, 8, 1.0)), line=3)]
        * 4,
        "docs_expert": [Example(array("i", range(1, 6 + 1)), (Answer(1, 6, 1.0),))] * 4,
    }
    settings = {"step_s": (0.05, 0.2), "steps": 24, "sync_s": 0.2, "round_steps": 4} | changes
    setup = Setup(model_dir=str(save_tiny_model(tmp_path / "model")), domains=tuple(rows), **settings)
    prepare(tmp_path / "race", setup, rows)
    return tmp_path / "race", setup, rows


def test_a_seat_has_the_client_s_rows_and_pace(tmp_path: Path) -> None:
    directory, setup, rows = made(tmp_path, step_s=(0.05, 0.4))
    seat = Seat(directory, 1)
    assert seat.setup == setup
    assert Seat(directory, 0).trainer._examples == rows["sql_expert"]
    assert seat.trainer._examples == rows["docs_expert"]
    seat.flat.copy_(initial_weights(setup.spec().layout, 0))
    before, began = seat.flat.clone(), time.monotonic()
    seat.step()
    assert time.monotonic() - began >= 0.4
    assert not torch.equal(seat.flat, before)


def test_snapshots_are_tested_until_one_has_the_loss() -> None:
    """And all of them if none has it: then there is no time, and the race goes on."""
    snapshots = [
        Snapshot(float(second), torch.tensor(loss), 0.25) for second, loss in enumerate((2.0, 1.5, 1.0, 0.5))
    ]
    assert losses_until(1.2, snapshots, float) == [(0.0, 2.0, 0.25), (1.0, 1.5, 0.25), (2.0, 1.0, 0.25)]
    curve = losses_until(0.1, snapshots, float)
    assert len(curve) == 4
    assert reached([point[:2] for point in curve], 0.1) is None


def test_a_race_is_kept(tmp_path: Path) -> None:
    """A file that was cut short, or that another release wrote, is none."""
    curve = Curve("alike", "Flower, rounds of 6", 1.5, [(0.0, 2.0, 0.0), (6.0, 1.4, 0.5)])
    file = tmp_path / curve.file_name("48x4s-n16")
    assert file.name == "race-alike-Flower-rounds-of-6-48x4s-n16.json"
    assert read(file) is None
    write(file, curve)
    assert read(file) == curve
    text = file.read_text()
    for odd in (text[:30], json.dumps({"goal": 1.5, "points": [[0.0, 2.0, 0.0]]}), "[]"):
        (tmp_path / "race-odd.json").write_text(odd)
        assert kept_races(tmp_path.glob("*.json")) == [curve]


def test_a_contestant_races_once(tmp_path: Path) -> None:
    """Later its file is read, unless another loss is to be reached."""
    _, setup, rows = made(tmp_path)
    played: list[Setup] = []

    def system(directory: Path, setup: Setup) -> Generator[Snapshot]:
        played.append(Seat(directory, 1).setup)
        yield Snapshot(0.0, torch.tensor(2.0))
        yield Snapshot(8.0, torch.tensor(1.0), 2.0)

    who = "Flower, rounds of 4"
    course = Course(1.5, rows, float, tmp_path, tmp_path / "scratch", "24x0.05s-n2")
    assert course.arrival("alike", who, system, setup) == Arrival(4.0, 3.0)
    assert course.arrival("alike", who, system, setup) == Arrival(4.0, 3.0)
    assert played == [setup]
    other = replace(course, goal=0.5, scratch=tmp_path / "again")
    assert other.arrival("alike", who, system, setup) is None
    assert len(played) == 2
    assert [curve.who for curve in kept_races(tmp_path.glob("race-*.json"))] == [who]


def test_flower_s_best_round_length_counts() -> None:
    """With and without the starts of its processes, that may be another length; one that arrives never is none."""
    theirs = {3: Arrival(100.0, 40.0), 6: Arrival(90.0, 50.0), 12: None}
    found = {one.name: one for one in race_figures("alike", Arrival(36.0, 36.0), theirs)}
    assert found["race_alike"].value == pytest.approx(36 / 90)
    assert found["race_alike"].met
    assert found["race_alike_without_starts"].value == pytest.approx(36 / 40)
    assert found["race_alike_flower_3_steps_s"].value == 100
    assert "race_alike_flower_12_steps_s" not in found
    assert "race_alike" not in {one.name for one in race_figures("alike", None, theirs)}
    alone = [one.name for one in race_figures("straggler", Arrival(1.0, 1.0), {6: None})]
    assert alone == ["race_straggler_fedmoe_s"]


def test_an_arrival_is_between_two_snapshots() -> None:
    curve = Curve("alike", "Flower, rounds of 6", 1.5, [(0.0, 2.0, 0.0), (20.0, 1.0, 8.0)])
    assert arrival_of(curve) == Arrival(10.0, 6.0)
    assert arrival_of(replace(curve, goal=0.5)) is None


def test_our_side_trains_the_gateway_and_saves_it_along_the_way(tmp_path: Path) -> None:
    directory, setup, _ = made(tmp_path)
    seen = list(run_fedmoe(directory, setup))
    assert len(seen) == 6 + 1
    seconds = [one.second for one in seen]
    assert seconds == sorted(seconds)
    assert seconds[-1] >= 24 * 0.05
    first = initial_weights(setup.spec().layout, 0)
    assert torch.equal(seen[0][1], first)
    assert not torch.equal(seen[-1][1], first)


@pytest.mark.slow
def test_a_run_of_the_learning_benchmark_in_real_processes(tmp_path: Path) -> None:
    """The workers take their steps and end; the gateway holds what they trained."""
    run = Run(scheme="real", mix="one", steps=4, rank=4, sync_s=0.5, gain=1.5, seed=3)
    rows = {"sql_expert": [Row(prompt=f"what {n}", completion="red", source="") for n in range(6)]}
    training = TrainingSettings(learning_rate=1e-3, batch_size=2, max_length=64, warmup_steps=1)
    played = play_real(run, str(save_tiny_model(tmp_path / "model")), rows, training)
    assert played.steps == 4
    assert 1 <= played.updates <= 4
    assert played.staleness == 0.0
    rules = played.rules.aggregation
    assert (played.rules.sync_interval_s, rules.gain, rules.balance) == (0.5, 1.5, BY_WORKER)
    assert not torch.equal(
        played.weights, initial_weights(adapter_layout(tiny_config(), LoraSettings(rank=4)), 3)
    )
