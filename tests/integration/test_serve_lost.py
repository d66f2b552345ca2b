"""Which models `fedmoe gateway serve` and `chat` have when Redis has lost some, or names are taken."""

from pathlib import Path

import pytest

from consumers.gateway.builder import GatewayBuilder
from fedmoe.errors import LostExpertError, UnknownExpertError
from fedmoe.protocol.names import GATEWAY
from fedmoe.settings import AnswerSettings, GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.remove import remove_expert
from fedmoe.tools.export import read_gateway
from fedmoe.tools.heldout import read_federation
from fedmoe.tools.serve.engine import Engine
from tests.errors import raises
from tests.integration.test_serve import engine_of, make

pytestmark = pytest.mark.one_server


def test_what_redis_has_lost_answers_on(
    connection: Connection, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Emptied, malformed, of a later release: the versions that were read before answer. What was removed is gone."""
    for seed, name in enumerate(("a", "b.c"), start=1):
        make(connection, tiny_model_dir, name, seed=seed)
    GatewayBuilder(connection, GatewaySettings(), holder="one", lease_s=5.0).refresh()
    engine = engine_of(connection)
    before = [one.version for one in engine.models()]
    client, keys = connection.client, connection.keys
    merged = client.hgetall(keys.merged.meta)
    client.hset(keys.merged.meta, "requires", "teleport")
    client.hset(keys.expert("a").meta, "version", "many")
    engine.refresh()
    assert [one.version for one in engine.models()] == before
    assert "the merged gateway needs teleport" in caplog.text
    client.hdel(keys.merged.meta, "requires")
    client.hset(keys.expert("a").meta, "version", 1)
    listed = client.hgetall(keys.experts)  # alone on a master of a cluster that lost its memory
    client.delete(keys.experts)
    engine.refresh()
    assert [one.version for one in engine.models()] == before
    client.hset(keys.experts, mapping=listed)
    client.hset(keys.merged.meta, "requires", "teleport")
    saved = {key: client.dump(key) for key in client.keys("fedmoe:*")}
    client.delete(*saved)
    engine.refresh()
    engine.refresh()
    assert [one.version for one in engine.models()] == before
    assert caplog.text.count("b.c: it cannot be read in Redis now, and b.c-v1-") == 1
    for key, value in saved.items():
        client.restore(key, 0, value)
    client.hdel(keys.merged.meta, "requires")
    assert client.hgetall(keys.merged.meta) == merged
    remove_expert(connection, "b.c")
    engine.refresh()
    assert [one.name for one in engine.models()] == [GATEWAY, "a", "base"]


@pytest.mark.parametrize("lost", ["meta", "weights", "whole list"])
def test_a_trained_gateway_that_redis_lost_is_not_replaced_by_the_merged_one(
    connection: Connection, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture, lost: str
) -> None:
    """It answers on, and its next version is served; a chat or an export that begins now is refused."""
    make(connection, tiny_model_dir, "a", seed=1)
    make(connection, tiny_model_dir, GATEWAY, seed=2)
    GatewayBuilder(connection, GatewaySettings(), holder="one", lease_s=5.0).refresh()
    client, keys = connection.client, connection.keys.expert(GATEWAY)
    engine = engine_of(connection)
    trained = engine.model(GATEWAY).version
    assert trained == read_gateway(GatewayStore(connection)).version_name()
    saved = {key: client.dump(key) for key in client.keys("fedmoe:{gateway}:*")}
    if lost == "whole list":  # Redis was emptied, and the other expert is written back first
        client.delete(*saved)
        client.hdel(connection.keys.experts, GATEWAY)
    else:
        client.delete(getattr(keys, lost))
    for _ in range(2):
        engine.refresh()
        assert engine.model(GATEWAY).version == trained
    if lost == "meta":
        assert caplog.text.count(f"gateway: it cannot be read in Redis now, and {trained} answers on") == 1
    if lost != "whole list":
        with raises(UnknownExpertError, about=GATEWAY):
            read_gateway(GatewayStore(connection))
        assert GATEWAY not in {one.name for one in engine_of(connection).models()}
        said: list[str] = []
        _, exports = read_federation(GatewayStore(connection), said.append)
        assert GATEWAY not in exports
        assert said[0].startswith("the gateway is left out: expert 'gateway'")
    engine = engine_of(connection)  # began while it was lost
    for key, value in saved.items():
        client.restore(key, 0, value, replace=True)
    client.hset(connection.keys.experts, GATEWAY, "0")
    engine.refresh()
    assert engine.model(GATEWAY).version == trained


def test_a_chat_with_a_lost_gateway_is_one_sentence(connection: Connection, tiny_model_dir: Path) -> None:
    """It is asked for by name, and never was removed."""
    make(connection, tiny_model_dir, "a", seed=1)
    make(connection, tiny_model_dir, GATEWAY, seed=2)
    connection.client.delete(connection.keys.expert(GATEWAY).meta)
    with raises(LostExpertError, about=GATEWAY):
        Engine(GatewayStore(connection), AnswerSettings(), report=lambda _: None, wanted=GATEWAY)


@pytest.mark.parametrize("was_removed_before", [True, False])
def test_the_gateway_answers_on_until_there_is_another(
    connection: Connection, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture, was_removed_before: bool
) -> None:
    """An operator removed the trained one, and Redis has lost the merged one; the aggregator builds it again."""
    make(connection, tiny_model_dir, "a", seed=1)
    make(connection, tiny_model_dir, GATEWAY, seed=2)
    builder = GatewayBuilder(connection, GatewaySettings(), holder="one", lease_s=5.0)
    builder.refresh()
    engine = engine_of(connection)
    remove_expert(connection, GATEWAY)
    if was_removed_before:
        engine.refresh()
    connection.client.delete(connection.keys.merged.meta)
    before = engine.model(GATEWAY).version
    for _ in range(2):
        engine.refresh()
        assert engine.model(GATEWAY).version == before
    assert caplog.text.count(f"gateway: it cannot be read in Redis now, and {before} answers on") == 1
    builder.refresh()
    engine.refresh()
    assert (engine.model(GATEWAY).version == before) is was_removed_before


def test_an_expert_named_like_the_base_model_is_said_not_to_answer(
    connection: Connection, tiny_model_dir: Path
) -> None:
    """`base` is the base model."""
    make(connection, tiny_model_dir, "base", seed=1)
    said: list[str] = []
    engine = Engine(
        GatewayStore(connection), AnswerSettings(device="cpu", precision="fp32"), report=said.append
    )
    engine.refresh()
    assert [one.version for one in engine.models()] == ["base"]
    assert any("the expert base cannot be asked" in line for line in said)
