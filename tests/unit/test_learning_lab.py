"""ops.bench.learning.lab: what it spares computing changes no loss."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from consumers.gateway.search import Objective, side_by_side
from fedmoe.data.encode import Example
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.tools.evaluate import mean_of_rows
from ops.bench.fedmoe_side import make_spec
from ops.bench.learning.lab import CPU, Lab, Material, Remembering, inputs_of, merges
from ops.bench.learning.runs import DOMAINS, GATEWAY, Run
from ops.bench.learning.stage import linears_in
from tests.strategies import randn
from tests.tiny import save_tiny_model
from tests.unit.test_learning import LAYOUT, LORA, examples, stage_of, trainer_of

SPEC = make_spec(LAYOUT, "int4", lora=LORA)


def adapter(seed: int) -> torch.Tensor:
    return initial_weights(LAYOUT, 0) + 0.1 * randn(seed, LAYOUT.numel)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    rows = {name: examples(seed) for seed, name in enumerate(DOMAINS)}
    model_dir = str(save_tiny_model(tmp_path / "model"))
    return Lab(2, Material(rows, rows, rows, pad_id=0, model_dir=model_dir), precision="fp32")


def test_linear_layers_in_bf16_give_the_same_bits_under_autocast() -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        stage = stage_of(SPEC)
        linears_in(stage.model, dtype)
        assert stage.model.get_input_embeddings().weight.dtype == torch.float32
        trainer = trainer_of(stage, 0)
        trainer._autocast = torch.bfloat16
        losses = [trainer.step().loss for _ in range(3)]
        merged = merges(SPEC, {str(seed): adapter(seed) for seed in (0, 1)})["cat 1"]
        stage.show_merged(merged)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = stage.model(input_ids=torch.arange(6)[None]).logits
        found.append((losses, trainer.flat, logits))
    (losses, flat, logits), (same_losses, same_flat, same_logits) = found
    assert losses == same_losses
    assert torch.equal(flat, same_flat)
    assert torch.equal(logits, same_logits)


def count_rows(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows whose losses the lab computes from now on."""
    computed: list[int] = []
    compute = lab._row_losses

    def counted(rows: Sequence[Example]) -> torch.Tensor:
        computed.append(len(rows))
        return compute(rows)

    monkeypatch.setattr(lab, "_row_losses", counted)
    return computed


def test_no_loss_is_computed_twice(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no other is taken for it: not of other weights, rows, domains or adapters beside."""
    first, other = adapter(1), adapter(2)
    shown: list[dict[str, float]] = []
    for flat, frozen in ((first, ()), (other, ()), (first, (other,))):
        lab.stage.show(flat, frozen=frozen)
        shown += [lab._shown_losses({name: lab.test[name][:rows] for name in DOMAINS}) for rows in (4, 8)]
    computed = count_rows(lab, monkeypatch)
    for _ in range(2):
        found = [
            lab.losses(rows, flat, DOMAINS, frozen=frozen)
            for flat, frozen in ((first, ()), (other, ()), (first, (other,)))
            for rows in (4, 8)
        ]
        assert found == shown
    assert sum(computed) == 3 * 3 * (4 + 8)


def test_adapters_that_do_nothing_have_the_base_s_loss(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = lab.stage.spec.layout
    with lab.stage.model.disable_adapter():
        base = lab._shown_losses({name: lab.test[name] for name in DOMAINS})
    computed = count_rows(lab, monkeypatch)
    for seed in range(3):
        assert lab.losses(8, initial_weights(layout, seed), DOMAINS) == base
    assert sum(computed) == 3 * 8


def test_routed_rows_have_their_expert_s_losses(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = {name: adapter(seed) for seed, name in enumerate(DOMAINS)}
    vectors = torch.eye(3)
    states = dict(zip(DOMAINS, ([0] * 8, [0, 1] * 4, [2] * 8), strict=True))
    monkeypatch.setattr(lab, "_vector", lambda name: vectors[DOMAINS.index(name)])
    prompts = iter([vectors[numbers] for numbers in states.values()])
    monkeypatch.setattr(lab, "_states", lambda rows: next(prompts))
    found = [lab.routed(8, experts), lab.routed(8, experts)]
    assert found[0] == found[1]
    for name, expert in ((DOMAINS[0], experts[DOMAINS[0]]), (DOMAINS[2], experts[DOMAINS[2]])):
        assert found[0][name] == lab.losses(8, expert, [name])[name]
    mixed = torch.zeros(8, dtype=torch.float64)
    for number, name in enumerate(DOMAINS[:2]):
        lab.stage.show(experts[name])
        mixed[number::2] = lab._row_losses(lab.test[DOMAINS[1]])[number::2]
    wanted = mean_of_rows(mixed, lab.test[DOMAINS[1]])
    assert found[0][DOMAINS[1]] == pytest.approx(wanted, rel=1e-5)


def test_equal_weights_are_weighed_once(lab: Lab) -> None:
    run = Run(scheme="apart", rank=2)
    spec, rows = lab.spec(run, GATEWAY), {"a": examples(0)}
    inputs = inputs_of(spec, {str(seed): adapter(seed) for seed in (0, 1)})
    options = {"pad_id": 0, "batch_size": 4, "device": CPU, "autocast": torch.float32, "report": [].append}
    name = lab.stage.show_merged(side_by_side(inputs.values()))
    equal, odd = torch.tensor([[0.5, 1.0]]), torch.tensor([[0.5, 1.0], [0.7, 1.0]])
    with Objective(lab.stage.model, inputs, rows, **options, adapter=name) as plain:
        wanted = [plain(equal), plain(odd)]
    with Remembering(lab.stage.model, inputs, rows, **options, adapter=name) as objective:
        assert [objective(equal), objective(odd), objective(equal.repeat(3, 1))] == [*wanted, wanted[0]]
        assert objective.passes == 2
