"""`fedmoe.join` with a function that measures the validation loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fedmoe
from fedmoe.errors import SettingsError
from fedmoe.store.connection import Connection
from tests.errors import raises
from tests.federation import serving
from tests.integration.test_member import (
    NAME,
    adam,
    adapted,
    make_tiny,
    tiny_spec,
    train,
    values,
    weights_in_redis,
)

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]


def test_a_loop_publishes_the_validation_loss_of_the_base(connection: Connection, connect: Connect) -> None:
    """Its function sees the base in the adapter, which then holds what was trained again."""
    make_tiny(connection)
    model = adapted(connection)
    seen: list[torch.Tensor] = []

    def measure() -> float:
        seen.append(values(model, tiny_spec()).clone())
        return 2.5

    with (
        serving(connect(), block_ms=20),
        fedmoe.join(
            connection.settings, {NAME: model}, name="own", validate={NAME: measure}, validation_rows=7
        ) as member,
    ):
        begin = weights_in_redis(connection)
        optimizer = adam(model)
        for _ in range(400):
            before = values(model, tiny_spec()).clone()
            train(member, model, optimizer, 1)
            if seen:
                break
        assert torch.equal(seen[0], begin)
        assert not torch.equal(values(model, tiny_spec()), begin)
        assert (values(model, tiny_spec()) - before).abs().max() < 0.01
        train(member, model, optimizer, 5)
    lines = [line for line in fedmoe.connect(connection.settings).expert(NAME).updates() if line.val_rows]
    assert (lines[0].val_loss, lines[0].val_version, lines[0].val_rows) == (2.5, 0, 7)


def test_a_loop_whose_validation_returns_no_number(connection: Connection, connect: Connect) -> None:
    make_tiny(connection)
    model = adapted(connection)
    measure: Any = str  # returns no number
    with (
        serving(connect(), block_ms=20),
        raises(SettingsError, about="validate"),
        fedmoe.join(
            connection.settings, {NAME: model}, validate={NAME: measure}, validation_rows=7
        ) as member,
    ):
        train(member, model, adam(model), 400)


@pytest.mark.parametrize(
    ("given", "about"),
    [
        ({"validate": {"docs_expert": float}, "validation_rows": 7}, "validate"),
        ({"validate": {NAME: 2.5}, "validation_rows": 7}, "validate"),
        ({"validate": {NAME: float}}, "validation_rows"),
        ({"validation_rows": 7}, "validate"),
    ],
)
def test_what_validates_must_fit(connection: Connection, given: dict[str, object], about: str) -> None:
    make_tiny(connection)
    with raises(SettingsError, about=about):
        fedmoe.join(connection.settings, {NAME: adapted(connection)}, **given)
