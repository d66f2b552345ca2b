"""Small experts with random factors, as the gateway merges them."""

import dataclasses
from typing import Any

from consumers.gateway.merge import MergeInput
from tests.strategies import random_expert

Q, V = "base_model.model.layers.0.q_proj", "base_model.model.layers.0.v_proj"


DIMS = {Q: (40, 30), V: (20, 30)}


RANK = 4


def expert(
    seed: int, dims: dict[str, tuple[int, int]] = DIMS, rank: int = RANK, **changes: Any
) -> MergeInput:
    return random_expert(seed, dims, rank, **changes)


def experts(n: int, **settings: Any) -> list[MergeInput]:
    return [expert(seed, **settings) for seed in range(n)]


def weighted(expert: MergeInput, weight: float) -> MergeInput:
    return dataclasses.replace(expert, weight=weight)
