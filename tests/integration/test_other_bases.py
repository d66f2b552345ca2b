"""An expert of another base model: what needs one base model leaves it out, and says so."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedmoe.errors import BaseModelError, DataError
from fedmoe.model.base import fingerprint
from fedmoe.settings import HeldOutSettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.follow.gain import HeldOutLoss
from tests.errors import raises
from tests.integration.test_evaluate_cli import run
from tests.integration.test_fit import builder
from tests.tiny import save_tiny_model, tiny_model
from tests.tiny_federation import make_federation, write_rows

pytestmark = pytest.mark.one_server
OTHER = "e" * 32  # the fingerprint of a base model of the same shape


@pytest.fixture
def data(connection: Connection, tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Rows for three experts; `beta` has another base model and gateway weight 0."""
    make_federation(connection, tiny_model_dir, ("beta", "blue", "red"))
    connection.client.hset(connection.keys.expert("beta").meta, "base_fingerprint", OTHER)
    connection.client.hset(connection.keys.experts, "beta", "0")
    builder(connection).refresh()
    (directory := tmp_path / "data").mkdir()
    for name in ("beta", "blue", "red"):
        write_rows(directory / f"{name}.jsonl", name, n_rows=2)
    return directory


def left_out(said: list[str]) -> list[str]:
    return [line.partition(":")[0] for line in said if " is left out: it is an adapter of another" in line]


def test_an_expert_of_another_base_model_is_left_out_of_the_table(connection: Connection, data: Path) -> None:
    """Its row and its rows; also if it has a weight and comes first; one of another shape, too."""
    said: list[str] = []
    found = run(connection, str(data), said=said)
    assert list(found.loss) == ["base", "blue", "red", "arrow", "gateway"]
    assert found.rows == {"blue": 2, "red": 2}
    assert found.built_from.keys() == {"blue", "red", "gateway"}
    assert left_out(said) == ["beta is left out"]
    assert found.routed.keys() == {"blue", "red", "mean"}
    beta = connection.keys.expert("beta")
    spec = GatewayStore(connection).spec("beta")
    other = replace(spec, base_config=dict(spec.base_config) | {"intermediate_size": 7})
    connection.client.set(beta.spec, other.to_json())
    connection.client.hset(beta.meta, mapping={"base_fingerprint": "", "spec": other.digest})
    connection.client.hset(connection.keys.experts, "beta", "1")
    said.clear()
    assert run(connection, str(data), said=said).rows == {"blue": 2, "red": 2}
    assert left_out(said) == ["beta is left out"]


def test_base_model_says_whose_experts_are_measured(
    connection: Connection, data: Path, tmp_path: Path
) -> None:
    """The gateway of the others is left out with them."""
    other = save_tiny_model(tmp_path / "other", seed=1)
    connection.client.hset(
        connection.keys.expert("beta").meta, "base_fingerprint", fingerprint(tiny_model(seed=1))
    )
    said: list[str] = []
    assert list(run(connection, str(data), base_model=str(other), said=said).loss) == ["base", "beta"]
    assert left_out(said) == ["blue is left out", "red is left out", "the gateway is left out"]


def test_what_cannot_be_left_out_is_one_sentence(connection: Connection, data: Path, tmp_path: Path) -> None:
    """An expert that --data names, rows of no other expert, and a base model of no expert that is known."""
    with raises(BaseModelError, about="base_model"):
        run(connection, f"red={data / 'red.jsonl'}", f"beta={data / 'beta.jsonl'}")
    connection.client.hset(connection.keys.expert("red").meta, "base_fingerprint", "")
    with raises(BaseModelError, about="fingerprint"):
        run(connection, str(data), base_model=str(save_tiny_model(tmp_path / "other", seed=1)))
    for name in ("blue", "red"):
        (data / f"{name}.jsonl").unlink()
    with raises(DataError, about="data"):
        run(connection, str(data))


def test_follow_measures_the_gateway_without_an_expert_of_no_weight(
    connection: Connection, data: Path
) -> None:
    """One that has a weight is refused, for nothing can be merged then; and so is one that --data names."""
    said: list[str] = []

    def loss(*texts: str) -> float:
        settings = HeldOutSettings(data=texts, precision="fp32", device="cpu")
        return HeldOutLoss(GatewayStore(connection), settings, said.append)(None)

    red, blue, beta = (f"{name}={data / f'{name}.jsonl'}" for name in ("red", "blue", "beta"))
    assert loss(str(data)) == loss(red, blue)
    assert left_out(said) == ["beta is left out"] * 2
    assert not any("no expert" in line for line in said)
    loss(red, f"rad={data / 'blue.jsonl'}")
    assert any(line.startswith("no expert of its own: rad (the experts are ") for line in said)
    for texts in ((red, beta), (beta,)):
        with raises(BaseModelError, about="base_model"):
            loss(*texts)
    connection.client.hset(connection.keys.experts, "beta", "1")
    with raises(BaseModelError, about="fingerprint"):
        loss(red)
