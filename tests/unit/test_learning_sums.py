"""ops.bench.learning: adapters that are added up, trained by one pass or as blocks, with a tiny model."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch

from consumers.gateway.merge import Merged
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.rules import AggregationRules
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Header
from ops.bench.fedmoe_side import make_spec
from ops.bench.learning.carry import OVER, OWN, SUMS, _losses, carry_out
from ops.bench.learning.lab import FITTED, FITTED_GROUPS, Lab, Material, merges, sum_of
from ops.bench.learning.report import lines_of
from ops.bench.learning.runs import DOMAINS, GATEWAY, Run, WorkerPlan
from ops.bench.learning.server import Server
from ops.bench.learning.virtual import servers_of, simulate
from ops.bench.processes import BenchError
from producers.trainer import StepResult
from tests.strategies import randn
from tests.tiny import save_tiny_model
from tests.unit.test_learning import LAYOUT, LORA, Walker, examples, play, stage_of, trainer_of


def test_one_pass_gives_each_adapter_the_gradient_beside_the_other() -> None:
    spec = make_spec(LAYOUT, "int4", lora=LORA)
    stage = stage_of(spec)
    first = trainer_of(stage, 0)
    second = trainer_of(stage, 0, init_seed=1, leader=first)
    other = stage_of(spec)
    alone = [trainer_of(other, 0), trainer_of(other, 0, init_seed=1)]
    for _ in range(3):
        for one, beside in zip(alone, [trainer.flat.clone() for trainer in alone][::-1], strict=True):
            one.frozen = (beside,)
        losses = [one.step().loss for one in (first, second, *alone)]
        assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
        for one, same in zip((first, second), alone, strict=True):
            assert torch.allclose(one.flat, same.flat, atol=1e-5)
    assert not torch.equal(first.flat, second.flat)
    with pytest.raises(BenchError, match="before the one whose passes"):
        second.step()


def test_a_trainer_of_its_own_is_not_touched_by_a_pair() -> None:
    """The adapter that a pair trained beside its first is neither active nor trained afterwards."""
    stage = stage_of(make_spec(LAYOUT, "int4", lora=LORA))
    first = trainer_of(stage, 0)
    second = trainer_of(stage, 0, init_seed=1, leader=first)
    for one in (first, second):
        one.step()
    before = second.flat.clone()
    lone, plain = trainer_of(stage, 1), trainer_of(stage_of(stage.spec), 1)
    for one in (lone, plain):
        one.step()
    assert torch.equal(lone.flat, plain.flat)
    assert torch.equal(second.flat, before)


def test_by_one_pass_both_chains_take_every_step() -> None:
    run = Run(scheme="onepass", steps=24, gain=2.0)
    servers, workers = play(run)
    assert [[chain.n_steps for chain in worker.chains] for worker in workers] == [[24, 24]] * 3
    assert set(servers) == {GATEWAY, *DOMAINS}
    alone, _ = play(Run(scheme="gateway", steps=24, gain=2.0))
    assert len(servers[GATEWAY].staleness) >= len(alone[GATEWAY].staleness)


class Remembering(Server):
    """A server that keeps what workers pulled of each version."""

    def __init__(self, name: str, spec: Spec, rules: AggregationRules) -> None:
        super().__init__(name, spec, rules)
        self.past = [self.pulled()]

    def decide(self, worker: str, header: Header, parts: Sequence[bytes]) -> None:
        super().decide(worker, header, parts)
        self.past.append(self.pulled())


@dataclass
class Looking(Walker):
    """A learner that notes which versions of the other chains are beside it at each step."""

    others: Sequence[Remembering] = ()
    seen: list[tuple[int, ...]] = field(default_factory=list)

    def step(self) -> StepResult:
        versions = [
            next(number for number, past in enumerate(other.past) if torch.equal(past, values))
            for other, values in zip(self.others, self.frozen, strict=True)
        ]
        self.seen.append(tuple(versions))
        return super().step()


def test_a_block_sees_the_others_as_last_pulled() -> None:
    """They change only at a pull of its own, to what was there then; its own updates are of its own block."""
    run = Run(scheme="blocks", steps=24, sync_s=6.0, delay_s=(0.25, 0.25))
    spec = make_spec(LAYOUT, run.wire_format, lora=LORA)
    remembering: dict[str, Remembering] = {}

    def server(name: str) -> Server:
        remembering[name] = Remembering(name, spec, run.rules)
        return remembering[name]

    servers, lookers = servers_of(run, server), dict[str, Looking]()

    def make(plan: WorkerPlan, chain: str, flat: torch.Tensor) -> Looking:
        others = [remembering[name] for name in DOMAINS if name != chain]
        walked = torch.zeros(len(flat), dtype=torch.float64)
        lookers[chain] = Looking(flat, DOMAINS.index(chain), walked, others=others)
        return lookers[chain]

    workers = simulate(run, servers, make)
    assert set(servers) == set(lookers) == set(DOMAINS)
    for name, looker in lookers.items():
        assert len(looker.seen) == 24
        assert looker.seen == sorted(looker.seen)
        assert looker.seen[0] == (0, 0)
        assert min(looker.seen[-1]) >= 2
        assert len(set(looker.seen)) <= 1 + servers[name].meta.version
    for worker in workers:
        (chain,) = worker.chains
        assert torch.equal(chain.ledger.base, chain.server.pulled())


@cache
def _lab(directory: Path) -> Lab:
    rows = {name: examples(seed) for seed, name in enumerate(DOMAINS)}
    material = Material(rows, rows, rows, pad_id=0, model_dir=str(save_tiny_model(directory)))
    return Lab(2, material, precision="fp32")


@pytest.fixture
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return _lab(tmp_path_factory.getbasetemp() / "tiny")


@pytest.mark.parametrize("scheme", ["onepass", "blocks"])
def test_losses_are_of_the_sums_that_they_name(lab: Lab, scheme: str) -> None:
    run = Run(scheme=scheme, rank=2, rows=4)
    servers = servers_of(run, lambda name: Server(name, lab.spec(run, name), run.rules))
    for seed, server in enumerate(servers.values()):
        server.weights.add_(randn(seed, len(server.weights)) * 0.1)
    spec, found = lab.spec(run), _losses(run, lab, servers)
    experts = {name: servers[name].weights for name in DOMAINS}
    for name, flat in experts.items():
        assert found[OWN][name] == lab.losses(4, flat, [name])[name]
    if scheme == "onepass":
        gateway = servers[GATEWAY].weights
        assert found[GATEWAY] == lab.losses(4, gateway, DOMAINS)
        for name, flat in experts.items():
            both = sum_of(spec, {GATEWAY: gateway, name: flat}, 1.0)
            assert found[OVER][name] == pytest.approx(lab.losses(4, both, [name])[name], abs=1e-5)
            assert found[OVER][name] != pytest.approx(found[GATEWAY][name], abs=1e-3)
    else:
        first, *others = experts.values()
        plain, less = (found[name] for name in SUMS)
        assert plain == pytest.approx(lab.losses(4, first, DOMAINS, frozen=others), abs=1e-5)
        assert less != pytest.approx(plain, abs=1e-3)


def test_chains_that_are_added_up_begin_at_weights_of_their_own(lab: Lab) -> None:
    """With the same A and B = 0 they would get the same gradients, and be one adapter with twice the B."""
    for scheme, n_seeds in (("onepass", 4), ("blocks", 4), ("twice", 1)):
        run = Run(scheme=scheme, rank=2)
        assert len({lab.spec(run, name).init_seed for name in (GATEWAY, *DOMAINS)}) == n_seeds
        assert lab.spec(run, GATEWAY).init_seed == run.seed


@pytest.mark.parametrize("scheme", ["onepass", "blocks"])
def test_sums_are_trained_through_ledger_and_fold(lab: Lab, scheme: str) -> None:
    """Their loss falls below the base's; the gateway with the own rows at home is better than alone."""
    run = Run(scheme=scheme, rank=2, rows=8, steps=48, gain=2.0)
    spec = lab.spec(run)
    base = statistics.fmean(lab.losses(8, initial_weights(spec.layout, spec.init_seed), DOMAINS).values())
    outcome = carry_out(run, lab)
    mean = {model: statistics.fmean(losses.values()) for model, losses in outcome.losses.items()}
    each = dict.fromkeys(DOMAINS, 48)
    if scheme == "onepass":
        assert outcome.steps == {GATEWAY: 144} | each
        assert mean[OVER] < mean[GATEWAY] < base
    else:
        assert outcome.steps == each
        assert max(mean[name] for name in SUMS) < base
    assert all(updates > 0 for updates in outcome.updates.values())
    (line, *_) = lines_of([(run, outcome)])
    assert line.all_steps == 144  # passes: one trains both adapters


def test_merges_are_fitted_on_validation_rows_only(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one weight an expert, or by layer groups: neither has a higher loss there than the best fixed scale."""
    monkeypatch.setattr("ops.bench.learning.lab.FIT_GROUPS", 2)  # this model has two layers
    run = Run(scheme="apart", rank=2, rows=4)
    spec = lab.spec(run)
    experts = {
        name: initial_weights(spec.layout, 0) + 0.05 * randn(seed, spec.layout.numel)
        for seed, name in enumerate(DOMAINS)
    }
    blind = Lab(2, Material({}, lab.valid, {}, pad_id=0, model_dir=lab.model_dir), precision="fp32")
    found = blind.fitted(run, experts)
    assert list(found) == [FITTED, FITTED_GROUPS]
    rows = {name: lab.valid[name][:4] for name in DOMAINS}

    def loss(merged: Merged) -> float:
        lab.stage.show_merged(merged)
        return statistics.fmean(lab._shown_losses(rows).values())

    fixed = min(loss(merged) for name, merged in merges(spec, experts).items() if name.startswith("cat"))
    losses = [loss(merged) for merged in found.values()]
    assert max(losses) <= fixed + 1e-6
    assert losses[1] != pytest.approx(losses[0], abs=1e-6)
