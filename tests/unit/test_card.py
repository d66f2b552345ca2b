"""fedmoe.tools.card and .losses: which losses are known of a version."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from fedmoe.tools.card import max_lora_rank
from fedmoe.tools.losses import training_loss, validation_loss
from tests.federation import first_meta, small_spec


def test_losses_are_numbers_or_unknown() -> None:
    """A new expert has none; a meta that measures no validation loss has none."""
    assert training_loss(first_meta(small_spec())) is None
    assert training_loss(first_meta(small_spec(), loss=1.5)) == 1.5
    assert validation_loss(first_meta(small_spec(), loss=1.5)) is None
    measured: Any = SimpleNamespace(validation_loss=1.25)
    assert validation_loss(measured) == 1.25
    measured.validation_loss = math.nan
    assert validation_loss(measured) is None


@pytest.mark.parametrize(("rank", "fits"), [(1, 8), (8, 8), (17, 32), (257, 320), (512, 512), (513, None)])
def test_the_option_that_vllm_needs(rank: int, fits: int | None) -> None:
    """The smallest of its ranks that is enough."""
    assert max_lora_rank(rank) == fits
