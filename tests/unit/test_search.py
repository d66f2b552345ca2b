"""consumers.gateway.search: the loss it lowers is that of the merged gateway, and what it finds is never worse."""

import math
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from consumers.gateway.merge import MergeInput, merge
from consumers.gateway.search import PRESENT, Found, Objective, loaded, search
from fedmoe.data.encode import Answer, Example
from fedmoe.errors import DataError, SettingsError
from fedmoe.model.adapter import adapter_layout, adapter_loaded
from fedmoe.model.base import structure
from fedmoe.protocol.fit import Weights
from fedmoe.protocol.layout import values_of
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.protocol.spec import Spec
from fedmoe.tools.base import Base
from fedmoe.tools.centralised import Job
from fedmoe.tools.evaluate import BASE, mean_loss
from producers.centralised import train
from tests.errors import raises
from tests.strategies import randn
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
TRAINING = TrainingSettings(learning_rate=1e-2, batch_size=4, warmup_steps=0)


def rows(shift: int, n_rows: int = 8) -> list[Example]:
    """Rows whose answer follows from the prompt, by another rule for each shift."""
    return [
        Example(array("i", [k, 5, shift + k, shift + 2 * k, 7]), (Answer(2, 5, 1.0),), k)
        for k in range(1, n_rows + 1)
    ]


DOMAINS = {"red": rows(40), "blue": rows(90)}


def make_base() -> Base:
    return Base(
        name="tiny", model=tiny_model(), config=tiny_config(), tokenizer=tiny_tokenizer(), fingerprint="",
        device=CPU, autocast=torch.float32,
    )  # fmt: skip


def make_spec(rank: int = 2) -> Spec:
    config, lora = tiny_config(), LoraSettings(rank=rank, alpha=4.0)
    return Spec(
        base_model="tiny", base_config=structure(config), layout=adapter_layout(config, lora), lora=lora
    )


def as_input(spec: Spec, flat: torch.Tensor) -> MergeInput:
    return MergeInput(layout=spec.layout, flat=flat, scaling=spec.lora.scaling, weight=1.0)


def noise(seed: int, rank: int = 2, size: float = 0.1) -> MergeInput:
    spec = make_spec(rank)
    return as_input(spec, initial_weights(spec.layout, 0) + size * randn(seed, spec.layout.numel))


@pytest.fixture(scope="module")
def trained() -> dict[str, MergeInput]:
    """An expert of each domain."""
    found, spec = {}, make_spec()
    for name, examples in DOMAINS.items():
        job = Job(base=make_base(), spec=spec, training=TRAINING, examples=examples, steps=25)
        file = bytes(train(job, lambda line: None))
        found[name] = as_input(spec, values_of(spec.layout, file).clone())
    return found


def on(model: nn.Module, experts: dict[str, MergeInput], said: list[str] | None = None) -> Objective:
    return Objective(
        model, experts, DOMAINS, pad_id=0, batch_size=3, device=CPU, autocast=torch.float32,
        report=[].append if said is None else said.append,
    )  # fmt: skip


@contextmanager
def lowering(experts: dict[str, MergeInput]) -> Iterator[Objective]:
    with loaded(make_base(), experts, make_spec()) as model, on(model, experts) as objective:
        yield objective


def find(
    experts: dict[str, MergeInput], *, n_groups: int = 1, max_passes: int = 25, present: Weights | None = None
) -> Found:
    with lowering(experts) as objective:
        return search(objective, n_groups=n_groups, max_passes=max_passes, present=present or {})


def merged_loss(experts: dict[str, MergeInput], weights: Weights) -> float:
    """The loss of the merged adapter itself."""
    merged = merge([replace(one, in_groups=weights[name]) for name, one in experts.items()], scale=None)
    config = make_spec().adapter_config(rank=merged.rank) | {"lora_alpha": merged.scaling * merged.rank}
    with adapter_loaded(tiny_model(), merged.buffer.file, config) as model:
        losses = [mean_loss(model, one, pad_id=0, batch_size=8, device=CPU) for one in DOMAINS.values()]
    return sum(losses) / len(losses)


def test_objective_is_the_loss_of_the_merged_gateway() -> None:
    """Also with experts of several ranks and scalings, and weights in groups of layers."""
    experts = {"a": noise(1), "b": noise(2, rank=3)}
    with lowering(experts) as lower:
        for weights in ({"a": (0.7,), "b": (1.9,)}, {"a": (0.0, 1.2), "b": (0.4, 0.1)}):
            table = torch.tensor([weights["a"], weights["b"]]).T
            assert lower(table) == pytest.approx(merged_loss(experts, weights), rel=1e-5)
    assert lower.passes == 2


def test_gradient_is_that_of_small_differences() -> None:
    experts = {"a": noise(1), "b": noise(2, rank=3)}
    weights = torch.tensor([[0.7, 0.4], [0.2, 1.1]], requires_grad=True)
    with lowering(experts) as lower:
        lower(weights)
        assert weights.grad is not None
        for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
            moved = []
            for step in (0.02, -0.02):
                other = weights.detach().clone()
                other[place] += step
                moved.append(lower(other))
            assert float(weights.grad[place]) == pytest.approx((moved[0] - moved[1]) / 0.04, abs=2e-3)


def test_fitted_weights_are_better_than_every_fixed_scale(trained: dict[str, MergeInput]) -> None:
    """And the same at each run; their loss is that of the gateway that is built of them."""
    found = find(trained)
    assert found.loss < min(found.before.values()) - 1e-3
    assert found.before[BASE] > found.before["scale 1"]
    assert found.loss == pytest.approx(merged_loss(trained, found.weights), abs=1e-4)
    assert find(trained) == found


def test_an_expert_that_harms_gets_next_to_no_weight(trained: dict[str, MergeInput]) -> None:
    found = find(trained | {"noise": noise(5, size=0.3)})
    assert found.weights["noise"][0] < 0.05
    assert found.weights["red"][0] > 0.5


def test_groups_of_layers_have_weights_of_their_own(trained: dict[str, MergeInput]) -> None:
    found = find(trained, n_groups=2)
    assert {len(weights) for weights in found.weights.values()} == {2}
    assert found.weights["red"][0] != found.weights["red"][1]
    assert found.loss == pytest.approx(merged_loss(trained, found.weights), abs=1e-4)


def test_present_weights_are_measured_and_not_made_worse(trained: dict[str, MergeInput]) -> None:
    """If they are of these experts; a search that may take no step gives them back."""
    best = find(trained)
    again = find(trained, present=best.weights, max_passes=1)
    assert again.before[PRESENT] == pytest.approx(best.loss, abs=1e-5)
    assert again.loss <= again.before[PRESENT]
    assert PRESENT not in find(trained, present={"green": (1.0,)}, max_passes=1).before
    assert PRESENT in find(trained, present={"red": (1.0, 0.0)}, max_passes=1).before


def test_weights_in_force_stay_where_no_search_can_begin_at_them(trained: dict[str, MergeInput]) -> None:
    """In other groups of layers, or with a weight of 0: the result of one pass is no worse than they are."""
    best = find(trained)
    assert find(trained, n_groups=2, present=best.weights, max_passes=1).loss == pytest.approx(
        best.loss, abs=1e-5
    )
    apart: Weights = {name: (one[0], one[0]) for name, one in best.weights.items()}
    again = find(trained, present=apart, max_passes=1)
    assert (again.weights, again.loss) == (apart, again.before[PRESENT])
    alone = {"red": trained["red"], "noise": noise(5, size=0.3)}
    zero: Weights = {"red": (1.2,), "noise": (0.0,)}
    again = find(alone, present=zero, max_passes=1)
    assert (again.weights, again.loss) == (zero, again.before[PRESENT])


def test_more_groups_than_layers_are_refused(trained: dict[str, MergeInput]) -> None:
    with raises(SettingsError, about="layer_groups"):
        find(trained, n_groups=3)


def test_hooks_go_with_the_context_and_each_pass_is_reported(trained: dict[str, MergeInput]) -> None:
    said: list[str] = []
    with loaded(make_base(), trained, make_spec()) as model:
        before = mean_loss(model, DOMAINS["red"], pad_id=0, batch_size=8, device=CPU)
        with on(model, trained, said) as objective:
            loss = objective(torch.zeros(1, 2))
        assert mean_loss(model, DOMAINS["red"], pad_id=0, batch_size=8, device=CPU) == before
    assert said == [f"pass 1 over the rows: loss {loss:.4f}"]


def test_loss_that_is_not_a_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Objective, "__call__", lambda self, weights: math.nan)
    with raises(DataError, about="loss"):
        find({"a": noise(1)})


def test_a_step_too_far_ends_the_search(
    trained: dict[str, MergeInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the best weights so far."""
    whole = find(trained)
    real, called = Objective.__call__, []

    def call(self: Objective, weights: torch.Tensor) -> float:
        loss = real(self, weights)
        called.append(loss)
        return loss if len(called) < 8 else math.nan

    monkeypatch.setattr(Objective, "__call__", call)
    found = find(trained)
    assert len(called) == 8
    assert whole.loss < found.loss == min(called[5:7])
