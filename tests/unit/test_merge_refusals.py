"""consumers.gateway.merge: what it cannot merge it refuses, with the module, the expert or the setting by name."""

import dataclasses
from typing import Any

import pytest
import torch

from consumers.gateway.merge import LORA_A, LORA_B, METHODS, MergeInput, merge
from fedmoe.errors import SettingsError, SpecError
from fedmoe.protocol.layout import Layout
from tests.experts import DIMS, Q, V, expert, experts, weighted
from tests.strategies import lora_layout


def blank(*tensors: tuple[str, tuple[int, ...]]) -> MergeInput:
    layout = Layout.of(tensors)
    return MergeInput(layout=layout, flat=torch.zeros(layout.numel), scaling=1.0, weight=1.0)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "mean"}, "one of cat, svd, average, ties, dare, not 'mean'"),
        ({"scale": 0.0}, "scale must be a number above 0"),
        ({"scale": float("nan")}, "scale must be a number above 0"),
        ({"method": "svd", "rank": 0}, "rank, of at least 1"),
        ({"method": "cat", "rank": 8}, "for 'svd' only"),
        ({"method": "dare", "density": 0.0}, "density must be between 0 and 1"),
        ({"method": "ties", "density": 1.0}, "density must be between 0 and 1"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, Any], match: str) -> None:
    """The message names the setting and what came."""
    with pytest.raises(SettingsError, match=match):
        merge(experts(2), **settings)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([], "no expert"),
        ([0.0, 0.0], "must add up to a number above 0"),
        ([1e308, 1e308], "must add up to a number above 0"),
        ([1.0, -1.0], "weight must be a number of at least 0"),
        ([1.0, float("nan")], "weight must be a number of at least 0"),
        ([1.0, float("inf")], "weight must be a number of at least 0"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(weights: list[float], match: str) -> None:
    """None at all, a sum of zero, negative or not finite."""
    with pytest.raises(SettingsError, match=match):
        merge([weighted(expert(0), weight) for weight in weights])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("odd", "match"),
    [
        (expert(1, dims={Q: (40, 30)}), "v_proj' is (20, 30) in the first expert, None in number 2"),
        (
            expert(1, dims=DIMS | {Q: (40, 31)}),
            "q_proj' is (40, 30) in the first expert, (40, 31) in number 2",
        ),
        (expert(1, scaling=0.0), "expert number 2 has the impossible scaling 0.0"),
        (
            dataclasses.replace(expert(1), flat=torch.full((4 * 120,), torch.nan)),
            "2 holds values that are not finite",
        ),
        (blank(("x.weight", (2, 2))), "'x.weight' is not a pair of LoRA factors"),
        (blank((Q + LORA_A, (2, 30)), (Q + LORA_B, (40, 3))), "q_proj' is not a pair of LoRA factors"),
        (blank((Q + LORA_A, (2, 30, 1)), (Q + LORA_B, (40, 2, 1))), "q_proj' is not a pair of LoRA factors"),
        (
            blank(*lora_layout({Q: (4, 4)}, 2).tensors, *lora_layout({V: (4, 4)}, 3).tensors),
            "different ranks, [2, 3]",
        ),
    ],
)
def test_experts_that_do_not_fit_are_refused(method: str, odd: MergeInput, match: str) -> None:
    """The message names the module or the expert, and both sides."""
    with pytest.raises(SpecError) as caught:
        merge([expert(0), odd], method=method)
    assert match in str(caught.value)


@pytest.mark.parametrize("method", ["average", "ties", "dare"])
def test_factor_methods_need_one_rank(method: str) -> None:
    """Factors of different ranks cannot be averaged; the message says what can."""
    with pytest.raises(SpecError, match=r"experts of one rank, these have \[4, 5\]: use 'cat' or 'svd'"):
        merge([expert(0), expert(1, rank=5)], method=method)


def test_an_adapter_that_no_file_can_hold_is_refused() -> None:
    """Before it is allocated: 600 experts of one layout would make 600 times its size."""
    layout = lora_layout({Q: (1000, 1000)}, 128)
    one = MergeInput(layout=layout, flat=torch.zeros(layout.numel), scaling=1.0, weight=1.0)
    with pytest.raises(SettingsError, match="would have 586 MiB, allowed are 512: use 'svd'"):
        merge([one] * 600)
