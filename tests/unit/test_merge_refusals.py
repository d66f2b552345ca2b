"""consumers.gateway.merge: what it cannot merge it refuses, with the module, the expert or the setting by name."""

import dataclasses
from typing import Any

import pytest
import torch

from consumers.gateway.merge import LORA_A, LORA_B, METHODS, MergeInput, merge
from fedmoe.errors import SettingsError, SpecError
from fedmoe.protocol.layout import Layout
from tests.errors import raises
from tests.experts import DIMS, Q, V, expert, experts, weighted
from tests.strategies import lora_layout


def blank(*tensors: tuple[str, tuple[int, ...]]) -> MergeInput:
    layout = Layout.of(tensors)
    return MergeInput(layout=layout, flat=torch.zeros(layout.numel), scaling=1.0, weight=1.0)


@pytest.mark.parametrize(
    ("settings", "about"),
    [
        ({"method": "mean"}, "method"),
        ({"scale": 0.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"method": "svd", "rank": 0}, "rank"),
        ({"method": "cat", "rank": 8}, "rank"),
        ({"method": "dare", "density": 0.0}, "density"),
        ({"method": "ties", "density": 1.0}, "density"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, Any], about: str) -> None:
    """By the name of the setting."""
    with raises(SettingsError, about=about):
        merge(experts(2), **settings)


@pytest.mark.parametrize(
    ("weights", "about"),
    [
        ([], "experts"),
        ([0.0, 0.0], "sum"),
        ([1e308, 1e308], "sum"),
        ([1.0, -1.0], "weights"),
        ([1.0, float("nan")], "weights"),
        ([1.0, float("inf")], "weights"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(weights: list[float], about: str) -> None:
    """None at all, a sum of zero, negative or not finite."""
    with raises(SettingsError, about=about):
        merge([weighted(expert(0), weight) for weight in weights])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("odd", "about"),
    [
        (expert(1, dims={Q: (40, 30)}), "modules"),
        (
            expert(1, dims=DIMS | {Q: (40, 31)}),
            "modules",
        ),
        (expert(1, scaling=0.0), "scaling"),
        (
            dataclasses.replace(expert(1), flat=torch.full((4 * 120,), torch.nan)),
            "values",
        ),
        (blank(("x.weight", (2, 2))), "factors"),
        (blank((Q + LORA_A, (2, 30)), (Q + LORA_B, (40, 3))), "factors"),
        (blank((Q + LORA_A, (2, 30, 1)), (Q + LORA_B, (40, 2, 1))), "factors"),
        (
            blank(*lora_layout({Q: (4, 4)}, 2).tensors, *lora_layout({V: (4, 4)}, 3).tensors),
            "rank",
        ),
    ],
)
def test_experts_that_do_not_fit_are_refused(method: str, odd: MergeInput, about: str) -> None:
    """Each rule by what it is about."""
    with raises(SpecError, about=about):
        merge([expert(0), odd], method=method)


@pytest.mark.parametrize("method", ["average", "ties", "dare"])
def test_factor_methods_need_one_rank(method: str) -> None:
    """Factors of different ranks cannot be averaged."""
    with raises(SpecError, about="rank"):
        merge([expert(0), expert(1, rank=5)], method=method)


def test_an_adapter_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is allocated: 600 experts of one layout would make 600 times its size."""
    monkeypatch.setattr("consumers.gateway.merge.MAX_MERGED_BYTES", 512 * 2**20)
    layout = lora_layout({Q: (1000, 1000)}, 128)
    one = MergeInput(layout=layout, flat=torch.zeros(layout.numel), scaling=1.0, weight=1.0)
    with raises(SettingsError, about="length"):
        merge([one] * 600)
