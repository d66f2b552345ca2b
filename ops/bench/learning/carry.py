"""Carries out one run, and keeps its outcome as one JSON file."""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedmoe.protocol.lora_init import initial_weights
from fedmoe.tools.routing import BY_ARROW, BY_VECTORS
from ops.bench.learning.lab import MERGED, TRAINING, Lab, is_expert, merges, sum_of
from ops.bench.learning.real import play_real
from ops.bench.learning.rounds import play_rounds
from ops.bench.learning.runs import BLOCKS, GATEWAY, ONE_PASS, SCHEMES, Run, WorkerPlan
from ops.bench.learning.server import Server
from ops.bench.learning.stage import StageTrainer
from ops.bench.learning.virtual import Worker, servers_of, simulate

BASE, OWN, OVER = "base", "own experts", "own experts over gateway"
SUMS = {"sum of blocks": 1.0, "sum of blocks × 0.85": 0.85}  # and by how much the sum is multiplied
OPTED_OUT = "gateway replayed without a domain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a run.

    Args:
        run: its fields.
        losses: model → domain → held-out loss.
        steps: chain → optimizer steps of all its workers; updates: chain → updates applied.
        staleness: chain → mean staleness of its updates.
        seconds: of training and evaluation on this machine; cpu_s: of this process, all threads together.
        precision: dtype of the computation on this machine.
        valid: domain → loss of the gateway on validation rows, by which rules are chosen.
        curve: virtual second and held-out loss of the gateway, averaged over the domains; empty unless traced.
    """

    run: dict[str, Any]
    losses: dict[str, dict[str, float]]
    steps: dict[str, int]
    updates: dict[str, int]
    staleness: dict[str, float]
    seconds: float
    cpu_s: float
    precision: str
    valid: dict[str, float]
    curve: list[list[float]]


Found = list[tuple[Run, Outcome]]


def carry_out(run: Run, lab: Lab) -> Outcome:
    """Train and measure."""
    return _carry_out_real(run, lab) if run.scheme == "real" else _carry_out_virtual(run, lab)


def _carry_out_real(run: Run, lab: Lab) -> Outcome:
    began, cpu_began = time.monotonic(), time.process_time()
    played = play_real(run, lab.model_dir, lab.training_rows(run.domains), TRAINING)
    return Outcome(
        run=asdict(run),
        losses={GATEWAY: lab.losses(run.rows, played.weights, run.domains)},
        steps={GATEWAY: played.steps},
        updates={GATEWAY: played.updates},
        staleness={GATEWAY: played.staleness},
        seconds=round(time.monotonic() - began, 1),
        cpu_s=round(time.process_time() - cpu_began, 1),
        precision=lab.precision,
        valid=lab.valid_losses(run.rows, played.weights, run.domains),
        curve=[],
    )


def _carry_out_virtual(run: Run, lab: Lab) -> Outcome:
    began, cpu_began = time.monotonic(), time.process_time()
    servers = servers_of(run, lambda name: Server(name, lab.spec(run, name), run.rules))
    gateways: dict[str, StageTrainer] = {}  # worker → its trainer of the gateway

    def make(plan: WorkerPlan, chain: str, flat: torch.Tensor) -> StageTrainer:
        gateway = gateways.get(plan.name)
        trainer = lab.trainer(run, plan, chain, flat, gateway if run.scheme == ONE_PASS else None)
        if gateway is None and chain == GATEWAY:
            gateways[plan.name] = trainer
        elif gateway is not None and run.scheme == "residual":
            trainer.frozen = (gateway.flat,)
        return trainer

    seen: list[tuple[float, torch.Tensor]] = []
    watch = (lambda now: seen.append((now, servers[GATEWAY].weights.clone()))) if run.trace else None
    if run.scheme == "rounds":
        steps = {GATEWAY: play_rounds(run, servers[GATEWAY], make, watch=watch)}
    else:
        workers = simulate(run, servers, make, watch=watch)
        steps = {name: _steps(workers, server) for name, server in servers.items()}
    domains = run.domains
    losses = _losses(run, lab, servers)
    valid = lab.valid_losses(run.rows, servers[GATEWAY].weights, domains) if GATEWAY in servers else {}
    curve = [
        [round(now, 2), statistics.fmean(lab.losses(run.rows, flat, domains).values())] for now, flat in seen
    ]
    return Outcome(
        run=asdict(run),
        losses=losses,
        steps=steps,
        updates={name: server.meta.version for name, server in servers.items()},
        staleness={name: statistics.fmean(server.staleness) for name, server in servers.items()},
        seconds=round(time.monotonic() - began, 1),
        cpu_s=round(time.process_time() - cpu_began, 1),
        precision=lab.precision,
        valid=valid,
        curve=curve,
    )


def _steps(workers: Iterable[Worker], server: Server) -> int:
    return sum(chain.n_steps for worker in workers for chain in worker.chains if chain.server is server)


def _losses(run: Run, lab: Lab, servers: dict[str, Server]) -> dict[str, dict[str, float]]:
    domains = run.domains
    experts = {name: server.weights for name, server in servers.items() if is_expert(name)}
    found: dict[str, dict[str, float]] = {}
    if run.scheme == "apart":
        spec = lab.spec(run)
        found[BASE] = lab.losses(run.rows, initial_weights(spec.layout, spec.init_seed), domains)
        merged_of = merges(spec, experts) | lab.fitted(run, experts) if run.merges else {}
        for name, merged in merged_of.items():
            found[name] = lab.losses(run.rows, merged, domains)
    gateway = servers[GATEWAY].weights if GATEWAY in servers else None
    if gateway is not None:
        found[GATEWAY] = lab.losses(run.rows, gateway, domains)
    if run.without:
        found[OPTED_OUT] = lab.losses(run.rows, servers[GATEWAY].without(run.without), domains)
    if experts:
        found[OWN] = {}
        for name, flat in experts.items():
            found[OWN] |= lab.losses(run.rows, flat, [name])
    if run.scheme == "apart" and run.merges and len(experts) > 1:
        found[BY_VECTORS], found[BY_ARROW] = lab.routed(run.rows, experts), lab.arrow(run.rows, experts)
    if run.scheme in ("residual", ONE_PASS) and gateway is not None:
        found[OVER] = {}
        for name, flat in experts.items():
            found[OVER] |= lab.losses(run.rows, flat, [name], frozen=(gateway,))
    if run.scheme == BLOCKS:
        for name, factor in SUMS.items():
            found[name] = lab.losses(run.rows, sum_of(lab.spec(run), experts, factor), domains)
    return found


def outcomes(
    runs: Iterable[Run], keep: Path, *, report: Callable[[str], None] = print
) -> Iterator[tuple[Run, Outcome]]:
    """The outcome of every run: one that is kept there, under whatever name, or else carried out and written there.

    Experts trained apart with their merges are also those without. A kept outcome that lacks models of its run is taken
    as it is, because measuring them means training again; `report` gets a line that names them.
    """
    labs: dict[int, Lab] = {}
    keep.mkdir(parents=True, exist_ok=True)
    for run in dict.fromkeys(runs):
        file, found = keep / f"{run.name}.json", dict(kept(keep))
        outcome = found.get(run) or found.get(replace(run, merges=True))
        if outcome is None:
            if run.rank not in labs:
                labs.clear()  # one base model in memory
                labs[run.rank] = Lab(run.rank)
            outcome = carry_out(run, labs[run.rank])
            write(file, outcome)
            report(f"    {run.name}: {outcome.seconds:.0f} s, {outcome.cpu_s:.0f} s of CPU")
        elif missing := lacking(run, outcome):
            report(f"    {run.name}: kept without {', '.join(missing)}; to measure them, remove its file")
        yield run, outcome


def lacking(run: Run, outcome: Outcome) -> list[str]:
    """The models that an outcome of this run has today, and this one has not: it was kept before they were measured."""
    if run.scheme != "apart" or not run.merges:
        return []
    routers = (BY_VECTORS, BY_ARROW) if len(run.domains) > 1 else ()
    return [model for model in (*MERGED, *routers) if model not in outcome.losses]


def read(file: Path) -> Outcome | None:
    """A kept outcome, None if there is none of this form."""
    try:
        outcome = Outcome(**json.loads(file.read_text()))
        _run_of(outcome.run)
    except (OSError, ValueError, TypeError, LookupError):
        return None
    return outcome


def write(file: Path, outcome: Outcome) -> None:
    """Write an outcome; the file is there whole or not at all."""
    fresh = file.with_suffix(".tmp")
    fresh.write_text(json.dumps(asdict(outcome), indent=1) + "\n")
    os.replace(fresh, file)


def kept(keep: Path) -> Found:
    """The outcomes that are kept in a directory, with their runs."""
    found = [outcome for file in sorted(keep.glob("*.json")) if (outcome := read(file))]
    pairs = [(_run_of(outcome.run), outcome) for outcome in found]
    order = list(SCHEMES)
    return sorted(
        pairs, key=lambda pair: (*pair[0].group, order.index(pair[0].scheme), pair[0].gain, pair[0].seed)
    )


def _run_of(fields: Mapping[str, Any]) -> Run:
    least, most = fields["delay_s"]
    return Run(**{**fields, "delay_s": (least, most)})
