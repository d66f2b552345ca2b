"""The merged gateway of experts that its aggregator serves: from memory, to the same bytes as from Redis."""

from collections.abc import Callable

import pytest
import torch

from consumers.gateway.builder import GatewayBuilder
from consumers.gateway.inputs import TRIES
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.settings import GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.inspect import Inspector
from fedmoe.tools.export import read_merged
from tests.federation import ScriptedWorker, make_expert, serve, small_spec
from tests.integration.test_fit import written

pytestmark = pytest.mark.one_server
Served = Callable[[str, str], AdapterBuffer | None]


def builder(connection: Connection, served: Served | None = None) -> GatewayBuilder:
    more = {"served": served} if served else {}
    return GatewayBuilder(connection, GatewaySettings(), holder="agg-1", lease_s=5.0, **more)


def test_the_same_bytes_as_from_redis(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """And Redis is not asked for the weights."""
    spec = small_spec(wire_format="int4")
    expert = make_expert(connection, spec=spec)
    for name in ("alice", "bob"):
        ScriptedWorker(connection, spec, name).push(torch.randn(spec.layout.numel))
    serve(expert)
    store = GatewayStore(connection)
    assert builder(connection).refresh()
    wanted = store.load_merged()
    assert wanted is not None
    connection.client.delete(store.keys.meta)
    with monkeypatch.context() as patch:
        patch.delattr(GatewayStore, "read")
        assert builder(connection, lambda _, commit: expert.settled.copy(commit)).refresh()
    found = store.load_merged()
    assert found is not None
    assert found[1] == wanted[1]
    assert found[0].built_from == wanted[0].built_from


def test_weights_of_another_commit_are_not_taken(connection: Connection) -> None:
    """Another aggregator serves the expert by now: what this one remembers is of an earlier commit."""
    expert = make_expert(connection)
    asked = []

    def served(name: str, commit: str) -> AdapterBuffer | None:
        asked.append((name, commit))
        return expert.settled.copy("0" * 16)

    assert builder(connection, served).refresh()
    assert asked == [("sql_expert", expert.meta.weights_commit)] * TRIES
    merged = GatewayStore(connection).merged()
    assert merged is not None
    assert merged.experts["sql_expert"].weights_commit == expert.meta.weights_commit


def test_an_expert_of_weight_0_makes_no_new_version(connection: Connection) -> None:
    """It is not in the gateway, so its updates change nothing there; with a weight again it is."""
    store = GatewayStore(connection)
    make_expert(connection, "a")
    other = make_expert(connection, "b")
    connection.client.hset(connection.keys.experts, "b", "0")
    build = builder(connection)
    assert build.refresh()
    merged = store.merged()
    assert merged is not None
    assert list(merged.experts) == ["a"]
    ScriptedWorker(connection, small_spec(), "alice", expert="b").push(torch.ones(small_spec().layout.numel))
    serve(other)
    assert not build.refresh()
    assert read_merged(store).behind == {}
    assert Inspector(connection).federation().merged.outdated == ()
    connection.client.hset(connection.keys.experts, "b", "1")
    assert read_merged(store).behind == {"b": 1}
    assert Inspector(connection).federation().merged.outdated == ("b",)
    assert build.refresh()
    merged = store.merged()
    assert merged is not None
    assert list(merged.experts) == ["a", "b"]


@pytest.mark.parametrize("weighting", ["examples", "updates"])
def test_weight_0_leaves_an_expert_out_whatever_weighs_the_others(
    connection: Connection, weighting: str
) -> None:
    """`fedmoe expert weight NAME 0` is how a team leaves."""
    for name in ("a", "b"):
        make_expert(connection, name, version=3, n_examples=40)
    connection.client.hset(connection.keys.experts, "b", "0")
    GatewayBuilder(connection, GatewaySettings(weighting=weighting), holder="agg-1", lease_s=5.0).refresh()
    merged = GatewayStore(connection).merged()
    assert merged is not None
    assert list(merged.experts) == list(merged.by_expert) == ["a"]


def test_an_expert_that_the_fit_leaves_out_makes_no_new_version(connection: Connection) -> None:
    """It came after the fit: `fedmoe gateway fit` again takes it in."""
    store = GatewayStore(connection)
    make_expert(connection, "a")
    other = make_expert(connection, "b")
    written(store, {"a": (1.0,)})
    build = builder(connection)
    assert build.refresh()
    ScriptedWorker(connection, small_spec(), "alice", expert="b").push(torch.ones(small_spec().layout.numel))
    serve(other)
    assert not build.refresh()
    assert read_merged(store).behind == {}
    assert Inspector(connection).federation().merged.outdated == ()
    written(store, {"a": (0.5,), "b": (0.5,)})
    assert build.refresh()
