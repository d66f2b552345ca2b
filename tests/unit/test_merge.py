"""consumers.gateway.merge: every method against the dense matrices it stands for."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consumers.gateway.merge import LORA_A, LORA_B, Merged, MergeInput, merge
from consumers.gateway.methods import METHODS
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.spec import Spec
from tests.experts import DIMS, RANK, Q, V, expert, experts, weighted
from tests.strategies import families, lora_layout


def dims_of(layout: Layout) -> dict[str, tuple[int, int]]:
    shapes = dict(layout.tensors)
    modules = [name.removesuffix(LORA_A) for name in shapes if name.endswith(LORA_A)]
    return {module: (shapes[module + LORA_B][0], shapes[module + LORA_A][1]) for module in modules}


def dense(adapter: MergeInput | Merged) -> dict[str, Tensor]:
    """ΔW = scaling · B A of each module, in double precision."""
    views = adapter.layout.views(adapter.flat.double())
    modules = dims_of(adapter.layout)
    return {module: adapter.scaling * views[module + LORA_B] @ views[module + LORA_A] for module in modules}


def wanted(experts: list[MergeInput], scale: float = 1.0) -> dict[str, Tensor]:
    """The dense gateway, scale · Σ wᵢ ΔWᵢ / Σ wᵢ."""
    total = sum(expert.weight for expert in experts)
    deltas = [dense(expert) for expert in experts]
    shares = [scale * expert.weight / total for expert in experts]
    return {
        m: sum((s * d[m] for s, d in zip(shares, deltas, strict=True)), torch.zeros(())) for m in deltas[0]
    }


def norm(matrices: dict[str, Tensor]) -> float:
    """Frobenius norm of all modules together."""
    return math.hypot(*(float(matrix.norm()) for matrix in matrices.values()))


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """‖one − other‖."""
    assert one.keys() == other.keys()
    return norm({module: one[module] - other[module] for module in one})


def rounding(family: list[MergeInput], scale: float = 1.0) -> float:
    """What fp32 may lose: 1e-6 of the most that the ΔWᵢ can add up to, for the sum itself may cancel."""
    return 1e-6 * scale * max(each.scaling * float(each.flat.square().sum()) for each in family)


@given(families(), st.floats(0.1, 3))
def test_cat_is_the_exact_weighted_sum(family: list[MergeInput], scale: float) -> None:
    """Whatever the ranks, scalings and weights: ΔW = scale · Σ wᵢ (αᵢ/rᵢ) BᵢAᵢ / Σ wᵢ, at rank Σ rᵢ."""
    merged = merge(family, scale=scale)
    assert apart(dense(merged), wanted(family, scale)) < rounding(family, scale)
    assert merged.layout == lora_layout(dims_of(family[0].layout), merged.rank)
    assert merged.layout.numel == sum(each.layout.numel for each in family)
    assert merged.scaling == family[0].scaling
    assert merged.relative_error == 0.0


@given(families(), st.integers(1, 12))
def test_svd_is_the_nearest_matrix_of_its_rank(family: list[MergeInput], rank: int) -> None:
    """Equal to cutting the dense matrix by SVD, and the error it reports is the true one."""
    merged = merge(family, method="svd", rank=rank)
    target = wanted(family)
    best = {}
    for module, matrix in target.items():
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        best[module] = u[:, :rank] * s[:rank] @ vh[:rank]
    assert merged.rank == rank
    reported = merged.relative_error * norm(target)
    assert reported == pytest.approx(apart(best, target), abs=rounding(family))
    assert reported == pytest.approx(apart(dense(merged), target), abs=rounding(family))


def test_svd_of_three_experts_equals_the_dense_svd() -> None:
    """Where the singular values are apart the matrices themselves agree, to 2e-5."""
    family = experts(3)
    merged = merge(family, method="svd", rank=5)
    for module, matrix in wanted(family).items():
        u, s, vh = torch.linalg.svd(matrix)
        best = u[:, :5] * s[:5] @ vh[:5]
        assert apart({module: dense(merged)[module]}, {module: best}) < 2e-5 * norm({module: best})


def test_svd_balances_its_factors_and_takes_the_largest_rank() -> None:
    """Both factors of a module have the same singular values; the default rank is the experts' largest."""
    merged = merge([expert(0, rank=3), expert(1, rank=6)], method="svd")
    views = merged.layout.views(merged.flat)
    assert merged.rank == 6
    for module in DIMS:
        a, b = (torch.linalg.svdvals(views[module + suffix]) for suffix in (LORA_A, LORA_B))
        assert torch.allclose(a, b, rtol=1e-4)


def test_svd_at_full_rank_loses_nothing() -> None:
    """With rank Σ rᵢ, or any larger one, svd and cat are the same ΔW."""
    family = experts(3)
    for rank in (3 * RANK, 3 * RANK + 5):
        merged = merge(family, method="svd", rank=rank)
        assert apart(dense(merged), dense(merge(family))) < rounding(family)
        assert merged.relative_error == pytest.approx(0, abs=1e-6)


@given(families(same_rank=True))
def test_the_error_of_averaging_factors_is_known(family: list[MergeInput]) -> None:
    """Σ ŵᵢ ΔWᵢ − s·B̄Ā = s · Σ ŵᵢ (Bᵢ−B̄)(Aᵢ−Ā), with differing scalings taken into the Bᵢ."""
    merged = merge(family, method="average")
    mean = merged.layout.views(merged.flat.double())
    views = [each.layout.views(each.flat.double()) for each in family]
    total = sum(each.weight for each in family)
    target = wanted(family)
    for module, matrix in dense(merged).items():
        residual = sum(
            each.weight
            / total
            * (view[module + LORA_B] * each.scaling - mean[module + LORA_B] * merged.scaling)
            @ (view[module + LORA_A] - mean[module + LORA_A])
            for each, view in zip(family, views, strict=True)
        )
        assert torch.allclose(target[module] - matrix, torch.as_tensor(residual), atol=1e-4, rtol=1e-4)


def test_averaging_is_exact_where_one_factor_is_shared() -> None:
    """Experts with one common A (or B) have no residual: factor and product space agree."""
    for suffix in (LORA_A, LORA_B):
        family = experts(3)
        for each in family[1:]:
            for module in DIMS:
                own, first = (e.layout.views(e.flat)[module + suffix] for e in (each, family[0]))
                own.copy_(first)
        assert apart(dense(merge(family, method="average")), wanted(family)) < rounding(family)


@given(families(same_rank=True), st.sampled_from(list(METHODS)))
def test_every_method_reports_its_true_error(family: list[MergeInput], method: str) -> None:
    """Also those that leave it to be computed, and those that err by more than the sum itself."""
    merged, target = merge(family, method=method), wanted(family)
    true = apart(dense(merged), target)
    assert merged.relative_error * norm(target) == pytest.approx(true, rel=1e-4, abs=4 * rounding(family))


def test_weights_without_scale_are_those_of_the_sum_in_each_group_of_layers() -> None:
    """ΔW = Σ wᵢ ΔWᵢ; a group in which all weights are 0 is the base model."""
    dims = {f"model.layers.{n}.q_proj": (20, 30) for n in range(4)}
    family = [expert(0, dims, scaling=0.5), expert(1, dims, rank=6)]
    target = [dense(each) for each in family]
    weights = ((0.25, 0.0), (1.5, 0.0))
    grouped = [dataclasses.replace(e, weight=1.0, in_groups=w) for e, w in zip(family, weights, strict=True)]
    for method, rank in (("cat", None), ("svd", 10)):
        merged = dense(merge(grouped, method=method, rank=rank, scale=None))
        for number, module in enumerate(dims):
            expected = sum(w[number // 2] * one[module] for w, one in zip(weights, target, strict=True))
            assert torch.allclose(merged[module], torch.as_tensor(expected), atol=1e-4)
    plain = [weighted(e, w[0]) for e, w in zip(family, weights, strict=True)]
    assert apart(dense(merge(plain, scale=None)), wanted(plain, 1.75)) < rounding(family, 1.75)


@pytest.mark.parametrize("method", ["cat", "svd", "average"])
def test_three_identical_experts_give_that_expert(method: str) -> None:
    """1.000 ×, where peft's "linear" combination of three adapters at 1/3 each gives 3.000 ×."""
    family = [expert(7, weight=1 / 3)] * 3
    assert apart(dense(merge(family, method=method)), dense(family[0])) < rounding(family)


@pytest.mark.parametrize("weight", [1e-30, 1.0, 3.7, 1e30])
@pytest.mark.parametrize("method", ["cat", "average"])
def test_one_expert_is_the_gateway_whatever_its_weight(method: str, weight: float) -> None:
    """Bit for bit, also if others of weight 0 stand beside it."""
    one = expert(0, weight=weight)
    for family in ([one], [weighted(expert(1), 0), one, weighted(expert(2), 0)]):
        merged = merge(family, method=method)
        assert torch.equal(merged.flat, one.flat)
        assert (merged.layout, merged.rank, merged.scaling) == (one.layout, RANK, one.scaling)


@given(families(), st.floats(0.1, 10))
def test_only_the_ratio_of_the_weights_counts(family: list[MergeInput], factor: float) -> None:
    """Multiplying all weights changes nothing; scale multiplies the result."""
    scaled = [weighted(each, each.weight * factor) for each in family]
    gateway = dense(merge(family))
    assert apart(dense(merge(scaled)), gateway) < rounding(family)
    times = {module: factor * matrix for module, matrix in gateway.items()}
    assert apart(dense(merge(family, scale=factor)), times) < rounding(family, factor)


@given(families(), st.floats(0.05, 0.95))
def test_the_gateway_is_linear_in_the_weights(family: list[MergeInput], mix: float) -> None:
    """The gateway of mixed shares is the mix of the gateways, seen as ΔW."""
    shares = [1 / len(family)] * len(family)
    others = [each.weight / sum(e.weight for e in family) for each in family]
    mixed = [mix * one + (1 - mix) * other for one, other in zip(shares, others, strict=True)]

    def gateway(weights: list[float]) -> dict[str, Tensor]:
        return dense(merge([weighted(each, weight) for each, weight in zip(family, weights, strict=True)]))

    one, other = gateway(shares), gateway(others)
    assert apart(gateway(mixed), {m: mix * one[m] + (1 - mix) * other[m] for m in one}) < rounding(family)


@given(families(same_rank=True), st.sampled_from(["cat", "average", "ties"]), st.randoms())
def test_the_order_of_the_experts_does_not_matter(family: list[MergeInput], method: str, rng: Any) -> None:
    """As ΔW; the factors of cat stand in another order."""
    shuffled = rng.sample(family, len(family))
    one, other = dense(merge(family, method=method)), dense(merge(shuffled, method=method))
    assert apart(one, other) < 2 * rounding(family)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_experts_give_the_same_bytes(method: str) -> None:
    """No clock, no chance; torch's own generator and the experts stay as they were."""
    family = experts(3)
    before = [each.flat.clone() for each in family]
    torch.manual_seed(1)
    first = merge(family, method=method)
    drawn = torch.rand(1)
    torch.manual_seed(2)
    second = merge(family, method=method)
    assert first.buffer.file == second.buffer.file
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    assert all(torch.equal(each.flat, flat) for each, flat in zip(family, before, strict=True))


def test_dare_is_right_on_average_and_depends_on_its_seed() -> None:
    """Over many seeds the mean of the factors is their average: dropping is made good by scaling up."""
    family = experts(3, scaling=1.0)
    flats = torch.stack([merge(family, method="dare", density=0.5, seed=seed).flat for seed in range(400)])
    assert not torch.equal(flats[0], flats[1])
    # Σ ŵ²x²(1/density − 1) / 400 is the variance of that mean; 6 of its deviations are out of reach.
    deviation = torch.stack([each.flat for each in family]).square().sum(dim=0).div(9 * 400).sqrt()
    assert ((flats.mean(dim=0) - merge(family, method="average").flat).abs() < 6 * deviation).all()


def test_dare_draws_anew_for_every_module() -> None:
    """Modules of one shape do not lose the same places."""
    layout = lora_layout({Q: (30, 30), V: (30, 30)}, RANK)
    ones = MergeInput(layout=layout, flat=torch.ones(layout.numel), scaling=1.0, weight=1.0)
    views = layout.views(merge([ones], method="dare").flat)
    assert not torch.equal(views[Q + LORA_A], views[V + LORA_A])
    assert set(views[Q + LORA_A].flatten().tolist()) == {0.0, 2.0}


def test_ties_by_hand() -> None:
    """Trim to half, elect each sign by the larger sum, average those that agree."""
    layout = lora_layout({Q: (2, 4)}, 1)  # A has 4 values, B 2
    rows = ([4.0, -3.0, 0.1, 0.2, 1.0, 5.0], [2.0, 5.0, -0.1, 0.3, 3.0, 2.0])
    family = [MergeInput(layout=layout, flat=torch.tensor(row), scaling=1.0, weight=2.0) for row in rows]
    assert merge(family, method="ties").flat.tolist() == [3.0, 5.0, 0.0, 0.0, 3.0, 5.0]


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_what_was_not_learned_is_not_trimmed(method: str) -> None:
    """With the initialisation given, experts that learned nothing in A give back A as it began."""
    init = expert(9)
    for module in DIMS:
        init.layout.views(init.flat)[module + LORA_B].zero_()
    family = [weighted(init, 1.0), weighted(init, 2.0)]
    assert torch.equal(merge(family, method=method, init=init.flat).flat, init.flat)
    assert not torch.equal(merge(family, method=method).flat, init.flat)


@pytest.mark.parametrize("method", METHODS)
def test_experts_that_learned_nothing_give_a_gateway_that_does_nothing(method: str) -> None:
    """At version 0 every B is 0, and so is the gateway's ΔW; nothing divides by it."""
    family = experts(2)
    for each in family:
        for module in DIMS:
            each.layout.views(each.flat)[module + LORA_B].zero_()
    merged = merge(family, method=method)
    assert all(matrix.abs().max() == 0 for matrix in dense(merged).values())
    assert merged.relative_error == 0.0


@pytest.mark.parametrize("method", ["cat", "svd", "average"])
def test_peft_loads_the_gateway_as_the_weights_merged_by_hand(method: str, tmp_path: Path) -> None:
    """The exported adapter's logits are those of the base model with W + ΔW in place of W."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tests.tiny import save_tiny_model

    base = str(save_tiny_model(tmp_path / "base"))
    model = AutoModelForCausalLM.from_pretrained(base)
    dims = {
        f"base_model.model.{name}": (layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if name.endswith((".q_proj", ".v_proj", ".down_proj"))
    }
    family = experts(3, dims=dims, scaling=0.5)
    merged = merge(family, method=method, scale=1.5)
    spec = Spec(
        base_model=base,
        base_config={},
        layout=family[0].layout,
        lora=LoraSettings(rank=RANK, alpha=0.5 * RANK),
    )
    adapter = tmp_path / "gateway"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(spec.adapter_config(rank=merged.rank)))
    (adapter / "adapter_model.safetensors").write_bytes(merged.buffer.file)

    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        plain = model(tokens).logits
        for module, matrix in dense(merged).items():
            model.get_submodule(module.removeprefix("base_model.model.")).weight += matrix.float()
        by_hand = model(tokens).logits
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)(tokens).logits
    assert torch.allclose(loaded, by_hand, atol=1e-5)
    assert (loaded - plain).abs().max() > 0.1
