"""A run in real processes: a Redis, an aggregator, and a `fedmoe worker run` for each worker of the mix.

The gateway has the rules of a new one, but for the run's gain, balance and interval of updates; these travel in the
run's wire format. The workers take their steps as fast as this machine lets them, so the number of steps between two
updates depends on it.
"""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from fedmoe.demo.corpus_rows import Row
from fedmoe.protocol.layout import values_of
from fedmoe.protocol.lines import AppliedLine, read_line
from fedmoe.protocol.rules import TRAIN_GATEWAY, RuleSet, TrainingSettings
from fedmoe.settings import RedisSettings
from fedmoe.store.change import change_rules_soon
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from ops.bench.fedmoe_side import aggregator_command
from ops.bench.learning.runs import GATEWAY, Run, WorkerPlan
from ops.bench.processes import BenchError, Processes

LONGEST_S = 3600.0  # of one run
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Played(NamedTuple):
    """The gateway after a run: its weights (numel,) fp32, steps, updates and their mean staleness, and its rules."""

    weights: torch.Tensor
    steps: int
    updates: int
    staleness: float
    rules: RuleSet


def play_real(
    run: Run, model_dir: str, rows: Mapping[str, Sequence[Row]], training: TrainingSettings
) -> Played:
    """Let each worker of the mix take its steps, and wait until all updates are decided.

    Args:
        run: of the scheme `real`; all its workers have the machine's speed.
        model_dir: directory of the base model.
        rows: domain → the rows of its workers.
        training: how they train.

    Raises:
        BenchError: if a process fails, or no update was applied.
    """
    plans = run.workers()
    with Processes("real") as processes:
        url = processes.redis()
        options = {
            "base-model": model_dir, "rank": run.rank, "alpha": 2 * run.rank, "seed": run.seed,
            "wire-format": run.wire_format, "sync-interval": run.sync_s, "train": TRAIN_GATEWAY,
            "learning-rate": training.learning_rate, "batch-size": training.batch_size,
            "max-length": training.max_length, "warmup-steps": training.warmup_steps,
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        processes.command("aggregator", *aggregator_command(url, run.domains, *words), **ONE_THREAD)
        connection = Connection(RedisSettings(url=url))
        store = GatewayStore(connection)
        wanted = {GATEWAY, *run.domains}
        processes.until("the experts", lambda: wanted <= store.experts().keys())
        change_rules_soon(
            ExpertStore(connection, GATEWAY),
            {"sync_interval": run.sync_s, "gain": run.gain, "balance": run.balance},
        )
        for name in run.domains:
            lines = (json.dumps(asdict(row)) + "\n" for row in rows[name])
            (processes.directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        for plan in plans:
            command = worker_command(url, plan, processes.directory / f"{plan.domain}.jsonl", model_dir)
            processes.command("worker", *command, may_end=True, **ONE_THREAD)
        processes.until("the workers", lambda: processes.has_ended("worker"), timeout_s=LONGEST_S)
        spec, (meta, file, log) = store.spec(GATEWAY), store.history(GATEWAY)
        weights = values_of(spec.layout, file).clone()
        connection.close()
    applied = [line for line in map(read_line, log) if isinstance(line, AppliedLine)]
    if not applied:
        raise BenchError(f"{run.name}: the gateway has none of its workers' updates")
    return Played(
        weights=weights,
        steps=sum(line.n_examples for line in applied) // training.batch_size,
        updates=len(applied),
        staleness=statistics.fmean(line.staleness for line in applied),
        rules=meta.rules,
    )


def worker_command(url: str, plan: WorkerPlan, data: Path, model_dir: str) -> list[str]:
    """The command line of a worker that takes as many steps as its plan says, all at this machine's speed."""
    steps = round((plan.stop_s - plan.start_s) * plan.speed)
    return [
        sys.executable, "-m", "fedmoe.cli.main", "worker", "run", "--redis", url, "--stream", plan.domain,
        "--name", plan.name, "--data", str(data), "--base-model", model_dir, "--device", "cpu",
        "--max-steps", str(steps), "--validate", "0", "--no-domain-vector", "--drain", "300",
    ]  # fmt: skip
