"""A fit in force, at the command line: given up, and in place of weights that a person sets."""

from pathlib import Path

import pytest

from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from tests.federation import make_expert
from tests.integration.test_evaluate_cli import make_federation
from tests.integration.test_fit import written
from tests.processes import fedmoe, fedmoe_here

pytestmark = pytest.mark.one_server


def test_a_prefix_without_a_federation_gets_no_fit_and_no_key(connection: Connection) -> None:
    """Not even the record that an operator gave up a fit, which keeps an aggregator from putting it back."""
    done = fedmoe_here("gateway", "fit", "--redis", connection.settings.url, "--remove", "--prefix", "typo")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no federation 'typo' at " in done.stderr
    assert not connection.client.keys("typo:*")


def test_a_configured_option_does_not_hinder_removing(connection: Connection, tmp_path: Path) -> None:
    """Only the command line is refused: the file has the options of the next fit."""
    make_expert(connection)
    (config := tmp_path / "fedmoe.toml").write_text("[gateway.fit]\nrows = 3\ndata = ['rows.jsonl']\n")
    words = ("--config", str(config), "gateway", "fit", "--redis", connection.settings.url, "--remove")
    assert fedmoe_here(*words).stdout == "there was no fit\n"


def test_weights_that_a_fit_replaces_are_said(connection: Connection, tiny_model_dir: Path) -> None:
    """Those of the commands, once each, and those of an aggregator, once for each fit; 0 leaves an expert out."""
    make_federation(connection, tiny_model_dir)
    store, url = GatewayStore(connection), ("--redis", connection.settings.url)
    weigh, serve = (
        ("expert", "weight", *url, "red"),
        ("aggregator", "run", *url, "--burst", "--gateway-scale", "1.8"),
    )
    assert fedmoe_here(*weigh, "2").stdout == "red: gateway weight 1 -> 2\n"
    assert "has no effect" not in fedmoe(*serve).stderr
    written(store, fitted_at=86_400.0)
    replaced = (
        "a fit of 1970-01-02 is in force and replaces this weight until `fedmoe gateway fit --remove`\n"
    )
    assert fedmoe_here(*weigh, "3").stdout == f"red: gateway weight 2 -> 3\n{replaced}"
    said = fedmoe(*serve, "--gateway-weights", "examples", "--expert", "red=4").stderr
    assert said.count("the fit of 1970-01-02 replaces scale and weights") == 1
    assert "what you gave has no effect: --gateway-scale, --gateway-weights, --expert red=4\n" in said
    assert "has no effect" not in fedmoe("aggregator", "run", *url, "--burst", "--expert", "red").stderr
    assert fedmoe_here(*weigh, "0").stdout == "red: gateway weight 4 -> 0\n"
    added = fedmoe_here("expert", "add", *url, "green").stdout
    assert (
        "a fit of 1970-01-02 is in force and the merged gateway leaves green out until you fit again" in added
    )
    done = fedmoe_here("expert", "add", *url, "gateway", "--weight", "3")
    assert (done.returncode, done.stdout) == (2, "")


def test_a_fit_of_a_later_release_does_not_hinder_a_weight(
    connection: Connection, tiny_model_dir: Path
) -> None:
    """The weight is set and the expert is added; then the command says that it cannot read the fit, and ends with 0."""
    make_federation(connection, tiny_model_dir)
    written(GatewayStore(connection))
    connection.client.hset("fedmoe:{merged}:fit", "requires", "time_travel")
    url = ("--redis", connection.settings.url)
    for words, first in (
        (("expert", "weight", *url, "red", "2"), "red: gateway weight 1 -> 2"),
        (("expert", "add", *url, "green"), "added green, "),
    ):
        done = fedmoe_here(*words)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(first)
        assert "a fit is in force, which this FedMoE cannot read: " in done.stdout
        assert "time_travel" in done.stdout


def test_a_configured_weight_is_not_the_gateways(
    connection: Connection, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The command says that a weight in the configuration file is for the other experts."""
    make_federation(connection, tiny_model_dir)
    (config := tmp_path / "fedmoe.toml").write_text("[expert.add]\nweight = 3\n")
    words = ("--config", str(config), "expert", "add", "--redis", connection.settings.url)
    said = "--weight 3 of the environment or the configuration file is for other experts; gateway has no weight\n"
    assert said in fedmoe_here(*words, "gateway").stdout
    assert "has no weight" not in fedmoe_here(*words, "green").stdout
    assert connection.client.hget(connection.keys.experts, "green") == b"3"
