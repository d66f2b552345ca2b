"""`fedmoe expert add | weight | list | show`, while all runs."""

import json
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from click.testing import Result

from consumers.daemon import Aggregator
from consumers.expert import Expert
from consumers.gateway.builder import GatewayBuilder
from fedmoe.errors import LostExpertError
from fedmoe.protocol.beat import Beat
from fedmoe.protocol.layout import values_of
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.rules import AggregationRules, RuleSet
from fedmoe.settings import AggregatorSettings, GatewaySettings, RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.remove import remove_expert
from fedmoe.store.worker import WorkerStore
from tests.errors import raises
from tests.federation import ScriptedWorker, make_expert, meta_of, small_spec
from tests.processes import eventually

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]
Command = Callable[..., Result]


@pytest.fixture
def expert(connection: Connection) -> Expert:
    spec = small_spec()
    return make_expert(connection, spec=spec, weights=initial_weights(spec.layout, spec.init_seed))


def test_weight_moves_the_gateway(connection: Connection, expert_command: Command) -> None:
    """At the builder's next look; 0 leaves an expert out."""
    make_expert(connection, "a", weights=torch.zeros(small_spec().layout.numel))
    make_expert(connection, "b")
    builder = GatewayBuilder(connection, GatewaySettings(method="average"), holder="one", lease_s=5.0)
    builder.refresh()
    before = GatewayStore(connection).load_merged()
    assert before is not None
    assert values_of(small_spec().layout, before[1]).any()
    said = expert_command("weight", "b", "0")
    assert said.output == "b: gateway weight 1 -> 0\n"
    assert builder.refresh()
    loaded = GatewayStore(connection).load_merged()
    assert loaded is not None
    assert not values_of(small_spec().layout, loaded[1]).any()  # those of a
    assert GatewayStore(connection).experts() == {"a": 1.0, "b": 0.0}
    for words, sentence in (
        (("weight", "b", "-1"), "No such option"),
        (("weight", "b", "nan"), "the gateway weight must be a number of at least 0, not nan"),
        (("weight", "c", "1"), "there is no expert 'c' at "),
        (("weight", GATEWAY, "2"), "the merged gateway is made of the other experts: name one of them"),
    ):
        done = expert_command(*words)
        assert sentence in (str(done.exception) + done.output)
        assert done.exit_code != 0


@pytest.fixture
def daemon(redis_url: str) -> Iterator[Aggregator]:
    """An aggregator of whatever experts there are."""
    made = Aggregator(
        RedisSettings(url=redis_url), ["sql_expert"], AggregatorSettings(block_ms=20, lease_s=1.0),
        GatewaySettings(interval_s=0.1), holder="one",
    )  # fmt: skip
    stop = threading.Event()
    thread = threading.Thread(target=made.run, args=(stop,))
    thread.start()
    yield made
    stop.set()
    thread.join()


def test_added_expert_is_served_while_the_aggregator_runs(
    expert: Expert, connection: Connection, daemon: Aggregator, expert_command: Command
) -> None:
    """Of the same base model, pinned, with the rules asked for; removed and added once more, it is served again."""
    expert_command("set", "sql_expert", "--lr", "0.5")
    said = expert_command("add", "docs_expert", "--weight", "2", "--sync-interval", "3")
    assert said.output == (
        "added docs_expert, with base model, adapter and rules of sql_expert\n"
        "train it: fedmoe worker run --stream docs_expert --data FILE\n"
    )
    store = GatewayStore(connection)
    assert store.experts() == {"docs_expert": 2.0, "sql_expert": 1.0}
    assert store.spec("docs_expert") == expert.spec
    meta, old = store.meta("docs_expert"), store.meta("sql_expert")
    assert (meta.base_fingerprint, meta.lineage != old.lineage, meta.version) == (
        old.base_fingerprint,
        True,
        0,
    )
    assert meta.rules == RuleSet(aggregation=AggregationRules(lr=0.5), sync_interval_s=3.0)
    for _ in range(2):
        worker = ScriptedWorker(connection, expert.spec, expert="docs_expert")
        worker.push(0.1)
        eventually("version 1", lambda: meta_of(connection, "docs_expert")[b"version"] == b"1", timeout_s=15)
        remove_expert(connection, "docs_expert")
        assert expert_command("add", "docs_expert").exit_code == 0


def test_expert_that_cannot_be_added_is_a_sentence(connection: Connection, expert_command: Command) -> None:
    """One that is there, one that Redis lost, and one that takes after none."""
    done = expert_command("add", "a")
    assert "there are no experts at " in str(done.exception)
    make_expert(connection, "a")
    done = expert_command("add", "a")
    assert str(done.exception) == "expert 'a' exists already: see `fedmoe expert show a`"
    assert done.exit_code != 0
    done = expert_command("add", "b", "--like", "c")
    assert "there is no expert 'c' at " in str(done.exception)
    done = expert_command("add", "b", "--weight", "-1")
    assert "the gateway weight must be" in str(done.exception)
    WorkerStore(connection, "lost", "alice").beat(Beat(lineage="0123456789abcdef"), ttl_s=15)
    done = expert_command("add", "lost")
    assert "expert 'lost' is gone from Redis, but worker alice trains on" in str(done.exception)
    connection.client.hset("fedmoe:experts", "listed", "1")
    assert "expert 'listed' is gone from Redis" in str(expert_command("add", "listed").exception)
    assert set(GatewayStore(connection).experts()) == {"a", "listed"}


def test_worker_finds_an_expert_that_is_created_while_it_looks(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It did not exist at the first look, and must not be called unknown by a list in which it stands."""
    make_expert(connection, "a")
    store = WorkerStore(connection, "late", "alice")
    get = connection.client.get

    def look(key: str) -> bytes | None:
        found = get(key)
        make_expert(connection, "late")
        return found

    monkeypatch.setattr(connection.client, "get", look)
    assert store.spec() == GatewayStore(connection).spec("a")
    monkeypatch.undo()
    connection.client.hset("fedmoe:experts", "listed", "1")
    with raises(LostExpertError, about="listed"):
        WorkerStore(connection, "listed", "alice").spec()


def test_list_and_show(expert: Expert, connection: Connection, expert_command: Command) -> None:
    """What is where, and under which rules."""
    expert_command("set", "sql_expert", "--max-norm", "7")
    heads, row = expert_command("list").output.splitlines()
    assert heads.split()[:4] == ["expert", "gateway", "weight", "version"]
    assert row.split() == ["sql_expert", "1", "0", "2", "0", "nobody"]
    shown = json.loads(expert_command("show", "sql_expert", "--json").output)
    assert shown["identity"]["spec"] == expert.spec.digest
    assert (shown["rules"]["number"], shown["rules"]["max_norm"]) == (2, 7.0)
    text = expert_command("show", "sql_expert").output
    assert "rules 2, which `fedmoe expert set sql_expert` changes:" in text
    assert any(line.split() == ["max_norm", "7"] for line in text.splitlines())
    connection.client.delete(expert.store.keys.weights)
    done = expert_command("list")
    assert str(done.exception) == "something is wrong with sql_expert: see `fedmoe status`"
