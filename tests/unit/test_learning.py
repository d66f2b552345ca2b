"""ops.bench.learning: the virtual clock, the books of virtual workers, and one model for many chains."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from consumers.gateway.merge import merge
from consumers.gateway.search import Objective, side_by_side
from fedmoe.data.encode import Answer, Example
from fedmoe.demo.corpus_rows import Row, Split
from fedmoe.model.adapter import adapter_layout
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.protocol.spec import Spec
from fedmoe.tools.evaluate import mean_loss
from ops.bench.fedmoe_side import make_spec
from ops.bench.learning.lab import CPU, halves_of, inputs_of, merges, share_of
from ops.bench.learning.rounds import play_rounds
from ops.bench.learning.runs import ALL, DOMAINS, GATEWAY, HALVES, MIXES, PARTS, SCHEMES, Run, WorkerPlan
from ops.bench.learning.server import Server
from ops.bench.learning.stage import Stage, StageTrainer
from ops.bench.learning.virtual import Clock, Worker, servers_of, simulate
from producers.trainer import StepResult
from tests.strategies import randn
from tests.tiny import tiny_config, tiny_model

LORA = LoraSettings(rank=2, alpha=4.0)
LAYOUT = adapter_layout(tiny_config(), LORA)
TRAINING = TrainingSettings(learning_rate=1e-2, batch_size=2, warmup_steps=2)


@dataclass
class Walker:
    """A learner that adds known random numbers."""

    flat: torch.Tensor
    seed: int
    walked: torch.Tensor
    n: int = 0
    frozen: Sequence[torch.Tensor] = ()

    def step(self) -> StepResult:
        step = randn(1000 * self.seed + self.n, len(self.flat)) * 1e-2
        self.n += 1
        self.flat.add_(step)
        self.walked.add_(step.double())
        return StepResult(loss=1.0, n_examples=2, n_tokens=9, position=2 * self.n, applied=True)


def play(run: Run) -> tuple[dict[str, Server], list[Worker]]:
    spec = make_spec(LAYOUT, run.wire_format, lora=LORA)
    servers = servers_of(run, lambda name: Server(name, spec, run.rules))

    def make(plan: WorkerPlan, chain: str, flat: torch.Tensor) -> Walker:
        number = [one.name for one in run.workers()].index(plan.name)
        seed = 2 * number + (chain == GATEWAY)
        return Walker(flat, seed, torch.zeros(len(flat), dtype=torch.float64))

    return servers, simulate(run, servers, make)


def test_events_happen_in_order_and_those_of_one_moment_as_planned() -> None:
    clock, seen = Clock(), []
    clock.at(2.0, lambda: seen.append(("c", clock.now)))
    clock.at(
        1.0, lambda: (seen.append(("a", clock.now)), clock.at(2.0, lambda: seen.append(("d", clock.now))))
    )
    clock.at(1.0, lambda: seen.append(("b", clock.now)))
    clock.run()
    assert seen == [("a", 1.0), ("b", 1.0), ("c", 2.0), ("d", 2.0)]


@pytest.mark.parametrize(("scheme", "mix"), [("gateway", "three"), ("turns", "slow"), ("apart", "eight")])
def test_same_seed_same_bytes(scheme: str, mix: str) -> None:
    run = Run(scheme=scheme, mix=mix, steps=24, gain=2.0)
    first, again, other = (play(r)[0] for r in (run, run, replace(run, seed=1)))
    assert all(torch.equal(first[name].weights, again[name].weights) for name in first)
    if scheme == "gateway":  # another order of events: other staleness, other weights
        assert not torch.equal(first[GATEWAY].weights, other[GATEWAY].weights)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mix", MIXES)
def test_every_order_of_events_conserves_the_training(mix: str, seed: int) -> None:
    """At the end local = base + pending + progress, and progress is what was trained and not sent."""
    run = Run(scheme="turns", mix=mix, steps=24, gain=2.0, seed=seed, delay_s=(0.0, 9.0))
    servers, workers = play(run)
    for chain in (chain for worker in workers for chain in worker.chains):
        assert isinstance(chain.learner, Walker)
        assert not chain.ledger.queue
        chain.settle()
        sent = torch.zeros_like(chain.ledger.base)
        for update in chain.ledger.kept:
            update.add_to(sent, torch.empty_like(sent))
        if chain.ledger.start is None:  # no update was forgotten
            left = chain.learner.walked - sent.double()
            assert torch.allclose(chain.ledger.progress(chain.learner.flat).double(), left, atol=1e-5)
    for server in servers.values():
        assert server.meta.version == len(server.staleness) > 0
        assert sum(
            chain.ledger.seq for worker in workers for chain in worker.chains if chain.server is server
        ) == (server.meta.version)


def test_a_lone_worker_s_chain_is_its_local_training() -> None:
    """Whatever the gain: a factor is never above lr."""
    for gain in (1.0, 3.0):
        servers, (worker,) = play(Run(scheme="gateway", mix="one", steps=24, gain=gain, wire_format="fp32"))
        assert torch.allclose(servers[GATEWAY].weights, worker.chains[0].learner.flat, atol=1e-6)
        assert set(servers[GATEWAY].staleness) == {0}


def test_a_worker_s_chains_do_not_touch_each_other() -> None:
    """By two passes the experts are those that are trained apart, for twice the compute."""
    apart, _ = play(Run(scheme="apart", steps=24, wire_format="fp32"))
    twice, _ = play(Run(scheme="twice", steps=24, compute=2.0, wire_format="fp32"))
    for name in DOMAINS:
        assert torch.allclose(apart[name].weights, twice[name].weights, atol=1e-5)


def test_three_equal_workers_are_two_updates_stale() -> None:
    servers, _ = play(Run(scheme="gateway", steps=96))
    steady = servers[GATEWAY].staleness[3:-3]
    assert sum(steady) / len(steady) == pytest.approx(2.0, abs=0.3)


def test_steps_and_starts_are_those_of_the_mix() -> None:
    for mix, most in (("slow", [24, 6, 24]), ("late", [24, 24, 12]), ("stops", [12, 24, 24])):
        _, workers = play(Run(scheme="gateway", mix=mix, steps=24))
        assert [worker.chains[0].n_steps for worker in workers] == most
    _, workers = play(Run(scheme="turns", steps=24))
    assert [[chain.n_steps for chain in worker.chains] for worker in workers] == [[12, 12]] * 3
    (central,) = Run(scheme="central", mix="slow", steps=24).workers()
    assert central.stop_s == 54.0


def test_a_run_that_merges_nothing_is_the_same_with_merges() -> None:
    assert Run(scheme="gateway", merges=False) == Run(scheme="gateway")
    assert Run(scheme="apart", merges=False) != Run(scheme="apart")


def test_names_of_runs_are_unique() -> None:
    for part, make in PARTS.items():
        runs = set(make(128, 3))
        assert len({run.name for run in runs}) == len(runs), part
        assert {run.scheme for run in runs} <= SCHEMES.keys()


def examples(seed: int) -> list[Example]:
    from array import array

    draw = random.Random(seed)
    return [
        Example(array("i", (draw.randrange(250) for _ in range(9))), (Answer(4, 9, 1.0),)) for _ in range(8)
    ]


def stage_of(spec: Spec) -> Stage:
    return Stage(tiny_model(), spec)


def trainer_of(
    stage: Stage, seed: int, *, init_seed: int = 0, leader: StageTrainer | None = None
) -> StageTrainer:
    flat = initial_weights(LAYOUT, init_seed).clone()
    return StageTrainer(
        stage=stage, flat=flat, examples=examples(seed), pad_id=0, settings=TRAINING, seed=seed,
        autocast=torch.float32, leader=leader,
    )  # fmt: skip


def test_trainers_that_share_a_model_do_not_touch_each_other() -> None:
    spec = make_spec(LAYOUT, "int4", lora=LORA)
    alone = []
    for seed in (0, 1):
        trainer = trainer_of(stage_of(spec), seed)
        for _ in range(4):
            trainer.step()
        alone.append(trainer.flat)
    stage = stage_of(spec)
    pair = [trainer_of(stage, seed) for seed in (0, 1)]
    for _ in range(4):
        for trainer in pair:
            trainer.step()
    assert all(torch.equal(trainer.flat, flat) for trainer, flat in zip(pair, alone, strict=True))


def test_an_adapter_under_another_is_frozen_and_counts() -> None:
    stage = stage_of(make_spec(LAYOUT, "int4", lora=LORA))
    lower = trainer_of(stage, 0)
    for _ in range(3):
        lower.step()
    before = lower.flat.clone()
    upper, plain = trainer_of(stage, 1), trainer_of(stage, 1)
    upper.frozen = (lower.flat,)
    on_top, bare = upper.step(), plain.step()
    assert torch.equal(lower.flat, before)
    assert on_top.loss != bare.loss
    assert not torch.equal(upper.flat, plain.flat)
    lower.step()  # and the lower one trains as before, without the upper
    again = trainer_of(stage_of(stage.spec), 0)
    for _ in range(4):
        again.step()
    assert torch.equal(lower.flat, again.flat)


def test_merged_adapters_are_shown_and_gone_again() -> None:
    spec = make_spec(LAYOUT, "int4", lora=LORA)
    stage = stage_of(spec)
    experts = {str(seed): initial_weights(LAYOUT, 0) + 0.1 * randn(seed, LAYOUT.numel) for seed in (0, 1)}

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return stage.model(input_ids=torch.arange(6)[None]).logits

    found = merges(spec, experts)
    stage.show(experts["0"])
    before = logits()
    stage.show_merged(found["cat 1"])
    assert found["cat 1"].rank == 4
    assert not torch.equal(logits(), before)
    stage.show(experts["0"])
    assert torch.equal(logits(), before)
    stage.show(experts["0"], frozen=(torch.zeros(LAYOUT.numel),))
    assert torch.allclose(logits(), before, atol=1e-6)


def test_merges_are_fitted_on_the_shared_model() -> None:
    """The loss of weights is that of the merge with these weights; other adapters on the model do not count."""
    spec = make_spec(LAYOUT, "int4", lora=LORA)
    stage = stage_of(spec)
    flats = {str(seed): initial_weights(LAYOUT, 0) + 0.1 * randn(seed, LAYOUT.numel) for seed in (0, 1)}
    stage.show(flats["0"])
    inputs, settings = inputs_of(spec, flats), {"pad_id": 0, "batch_size": 4, "device": CPU}
    with Objective(
        stage.model, inputs, {"a": examples(0)}, **settings, autocast=torch.float32, report=[].append,
        adapter=stage.show_merged(side_by_side(inputs.values())),
    ) as objective:  # fmt: skip
        loss = objective(torch.tensor([[0.5, 1.25]]))
    weighted = [replace(one, weight=w) for one, w in zip(inputs.values(), (0.5, 1.25), strict=True)]
    stage.show_merged(merge(weighted, scale=None))
    assert mean_loss(stage.model, examples(0), **settings) == pytest.approx(loss, rel=1e-5)


def test_rows_of_workers() -> None:
    rows: dict[str, Sequence[Example]] = {name: examples(seed) for seed, name in enumerate(DOMAINS)}
    rows[DOMAINS[2]] = rows[DOMAINS[2]][:3]
    tenth = WorkerPlan(name="w", domain=DOMAINS[0], stop_s=1.0, share=0.25)
    assert share_of(rows, tenth) == rows[DOMAINS[0]][:2]
    both = share_of(rows, WorkerPlan(name="w", domain=ALL, stop_s=1.0))
    assert len(both) == 24
    assert both[16:22] == [*rows[DOMAINS[2]], *rows[DOMAINS[2]]]


def test_six_domains_are_the_halves_of_three_by_source() -> None:
    """Each row is in one half, all rows of a source are in the same, and no half is empty if there are two sources."""

    def rows(*sources: str) -> tuple[Row, ...]:
        return tuple(Row(prompt=f"{n}", completion=f"{n}", source=source) for n, source in enumerate(sources))

    split = Split(train=rows(*"aabbccd"), valid=rows("x", "y", "x"), test=rows("z", "w"))
    first, second = halves_of(split)
    assert [row.source for row in first.train] == ["a", "a", "c", "c"]
    assert [row.source for row in second.train] == ["b", "b", "d"]
    assert [len(half.valid) for half in (first, second)] == [2, 1]
    assert [row.source for half in (first, second) for row in half.test] == ["w", "z"]
    six = Run(scheme="gateway", mix="six", steps=24)
    assert six.domains == HALVES == tuple(plan.domain for plan in six.workers())
    assert len(HALVES) == 6
    central = Run(scheme="central", mix="six", steps=24)
    assert central.domains == HALVES
    assert central.workers()[0].stop_s == 6 * 24
    every = {name: examples(seed) for seed, name in enumerate(HALVES)}
    assert len(share_of(every, WorkerPlan(name="w", domain=ALL, stop_s=1.0), HALVES)) == 6 * 8


def test_gateway_without_a_domain_holds_what_the_others_sent() -> None:
    """What the replays leave out, domain by domain, adds up to what was trained."""
    servers, _ = play(Run(scheme="gateway", steps=24, gain=2.0, wire_format="fp32"))
    gateway = servers[GATEWAY]
    assert torch.equal(gateway.without("nobody_expert"), gateway.weights)
    first = initial_weights(LAYOUT, gateway.spec.init_seed)
    parts = [gateway.weights - gateway.without(domain) for domain in DOMAINS]
    assert all(float(part.abs().max()) > 1e-3 for part in parts)
    assert torch.allclose(first + sum(parts), gateway.weights, atol=1e-5)


def test_rounds_move_by_the_mean_and_wait_for_the_slowest() -> None:
    run = Run(scheme="rounds", mix="straggler", steps=24, sync_s=12.0, gain=2.0, delay_s=(0.25, 0.25))
    server = servers_of(run, lambda name: Server(name, make_spec(LAYOUT, "fp32", lora=LORA), run.rules))[
        GATEWAY
    ]
    first, walkers, seen = server.weights.clone(), list[Walker](), list[float]()

    def make(plan: WorkerPlan, chain: str, flat: torch.Tensor) -> Walker:
        walkers.append(Walker(flat, len(walkers), torch.zeros(len(flat), dtype=torch.float64)))
        return walkers[-1]

    assert play_rounds(run, server, make, watch=seen.append) == 4 * 24
    assert seen == [0.0, 48.5, 97.0]
    mean = torch.stack([walker.walked for walker in walkers]).mean(0)
    assert torch.allclose(server.weights, (first + 2 * mean).float(), atol=1e-5)


def test_the_clock_is_watched_once_in_a_sync_interval() -> None:
    run = Run(scheme="gateway", mix="straggler", steps=24)
    servers = servers_of(run, lambda name: Server(name, make_spec(LAYOUT, "fp32", lora=LORA), run.rules))
    seen: list[tuple[float, int]] = []

    def make(plan: WorkerPlan, chain: str, flat: torch.Tensor) -> Walker:
        return Walker(flat, 0, torch.zeros(len(flat), dtype=torch.float64))

    simulate(run, servers, make, watch=lambda now: seen.append((now, servers[GATEWAY].meta.version)))
    assert [now for now, _ in seen] == [0.0, 6.0, 12.0, 18.0, 24.0]
    versions = [version for _, version in seen]
    assert versions == sorted(versions)
    assert 0 == versions[0] < versions[2] < versions[4]
