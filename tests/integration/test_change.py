"""`fedmoe expert set | weight | add | list | show`: what an operator changes while all runs."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from consumers.aggregator import AggregatorSettings
from consumers.create import SpecRequest, ensure_experts
from consumers.daemon import Aggregator
from consumers.expert import Expert
from consumers.gateway import GatewayBuilder, GatewaySettings
from consumers.verify import replay
from fedmoe.archive import Archive
from fedmoe.beat import Beat
from fedmoe.cli.main import cli
from fedmoe.errors import FedMoEError, StaleStateError
from fedmoe.lora_init import initial_weights
from fedmoe.rules import AggregationRules, RuleSet, TrainingSettings
from fedmoe.spec import LoraSettings
from fedmoe.store import change
from fedmoe.store.connection import Connection, RedisSettings
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.remove import remove_expert
from fedmoe.store.worker import WorkerStore
from tests.counting import CountingWorker, counting_spec, create_expert
from tests.federation import ScriptedWorker, make_expert, serve, serving, small_spec
from tests.processes import eventually

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]
Command = Callable[..., Result]


@pytest.fixture
def expert_command(redis_url: str) -> Command:
    """`fedmoe expert …` on the test's server; an error as the person sees it."""

    def run(*words: str) -> Result:
        return CliRunner().invoke(cli, ["expert", words[0], "--redis", redis_url, *words[1:]])

    return run


@pytest.fixture
def expert(connection: Connection) -> Expert:
    spec = small_spec()
    return make_expert(connection, spec=spec, weights=initial_weights(spec.layout, spec.init_seed))


def meta_of(connection: Connection, name: str = "sql_expert") -> dict[bytes, bytes]:
    return dict(connection.client.hgetall(f"fedmoe:{{{name}}}:meta"))


def assert_replay_is_equal(connection: Connection, archive: Path) -> None:
    meta, weights, lines = GatewayStore(connection).history("sql_expert")
    done = replay(small_spec(), meta, lines, Archive(archive / "sql_expert", read_only=True))
    assert done.problem == ""
    assert done.weights.same_values(weights)


def test_updates_weigh_what_the_rules_of_their_application_say(
    expert: Expert, connection: Connection, connect: Connect, tmp_path: Path, expert_command: Command
) -> None:
    """One before the change, one published before and applied after, one after; the replay is equal byte for byte."""
    workers = [ScriptedWorker(connection, expert.spec, name) for name in "abc"]
    with serving(connect(), keep_updates=tmp_path):
        workers[0].push(1.0)
        eventually("version 1", lambda: expert.store.load().meta.version == 1)
    workers[1].push(1.0)
    said = expert_command("set", "sql_expert", "--lr", "0.5", "--decay", "constant")
    assert said.output == "sql_expert: rules 2 are in force: lr 1 -> 0.5, decay polynomial -> constant\n"
    workers[2].push(1.0)
    with serving(connect(), keep_updates=tmp_path):
        eventually("version 3", lambda: expert.store.load().meta.version == 3)
    expert.load()
    first = initial_weights(expert.spec.layout, expert.spec.init_seed)
    assert torch.allclose(expert.buffer.flat, first + 2.0)
    lines = [line for _, line in connection.client.xrange(expert.store.keys.log)]
    assert [line.get(b"rules") for line in lines] == [b"1", None, b"2", b"2"]
    assert lines[1][b"changed"] == b"lr 1 -> 0.5, decay polynomial -> constant"
    assert_replay_is_equal(connection, tmp_path)
    del lines[1]
    meta, _, _ = GatewayStore(connection).history("sql_expert")
    text = [{k.decode(): v.decode() for k, v in line.items()} for line in lines]
    done = replay(small_spec(), meta, text, Archive(tmp_path / "sql_expert", read_only=True))
    assert done.problem == "version 1: it was decided under rules 1, which are not in the log"


def test_many_changes_under_load(
    expert: Expert, connection: Connection, connect: Connect, tmp_path: Path
) -> None:
    """Each is a commit between two of a busy aggregator; all updates are applied, the replay is equal."""
    store = ExpertStore(connect(), "sql_expert")
    worker = ScriptedWorker(connection, expert.spec)
    with serving(connect(), block_ms=5, keep_updates=tmp_path):
        for number in range(2, 12):
            worker.push(0.01)
            _, after = change.change_rules_soon(store, {"lr": 1 / number})
            assert after.number == number
            eventually("a decision", lambda: worker.pull().how)
    meta = expert.store.load().meta
    assert (meta.applied, meta.refused, meta.rules.number) == (10, 0, 11)
    assert_replay_is_equal(connection, tmp_path)


def test_change_that_meets_a_commit_is_tried_again(
    expert: Expert, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds its moment; on a commit that it has not seen, it changes nothing."""
    worker, look = ScriptedWorker(connection, expert.spec), ExpertStore.condition

    def look_and_commit(store: ExpertStore) -> object:
        found = look(store)
        worker.push(0.1)
        assert serve(expert) == ["applied"]
        monkeypatch.setattr(ExpertStore, "condition", look)
        return found

    monkeypatch.setattr(ExpertStore, "condition", look_and_commit)
    with pytest.raises(StaleStateError):
        change.change_rules(expert.store, {"lr": 0.5})
    monkeypatch.setattr(ExpertStore, "condition", look_and_commit)
    worker.pull()
    assert change.change_rules_soon(expert.store, {"lr": 0.5})[1].number == 2
    meta = expert.load().meta
    assert (meta.version, meta.rules.aggregation.lr) == (2, 0.5)


def test_worker_takes_over_what_concerns_it(
    connection: Connection, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """At its next pull, with a sentence: the sync interval, and what its training goes by."""
    caplog.set_level(logging.INFO)
    spec = counting_spec()
    store = create_expert(connection, spec, sync_interval_s=0.5)
    adopted: list[TrainingSettings] = []
    with serving(connect()), CountingWorker(connect(), spec) as worker:
        worker.trainer.adopt = adopted.append  # type: ignore[method-assign]
        change.change_rules_soon(
            store, {"sync_interval": 0.02, "learning_rate": 0.125, "max_length": 64, "lr": 0.5}
        )
        eventually("new settings", lambda: adopted, timeout_s=10)
        before = worker.sync.status.published
        eventually("many updates", lambda: worker.sync.status.published > before + 10, timeout_s=20)
    assert [one.learning_rate for one in adopted] == [0.125]
    assert (
        "rules 2 are in force, they were 1: lr 1 -> 0.5, sync_interval 0.5 -> 0.02, learning_rate 0.0002 -> 0.125, "
        "max_length 512 -> 64; max_length takes effect when this worker is started again"
    ) in caplog.text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nobody", "--lr", "0.5"], "there is no expert 'nobody' at .*; there are: sql_expert$"),
        (["gateway", "--lr", "0.5"], "an expert cannot be called 'gateway'"),
        (
            ["sql_expert"],
            "nothing to change: name a rule, for example --lr 0.5; `fedmoe expert show sql_expert`",
        ),
        (["sql_expert", "--lr", "0"], "lr must be a number above 0, not 0.0$"),
        (["sql_expert", "--lr", "nan"], "lr must be a number above 0, not nan$"),
        (
            ["sql_expert", "--batch-size", "0"],
            "batch_size must be a whole number of at least 1 \\(rows\\), not 0$",
        ),
        (["sql_expert", "--decay-a", "-1"], "decay_a must be a number of at least 0, not -1.0$"),
    ],
)
def test_change_that_cannot_be_is_a_sentence(
    expert: Expert, connection: Connection, expert_command: Command, words: list[str], sentence: str
) -> None:
    """And changes nothing."""
    before = meta_of(connection)
    done = expert_command("set", *words)
    assert isinstance(done.exception, FedMoEError)
    assert done.exception.exit_code == 2
    with pytest.raises(FedMoEError, match=sentence):
        raise done.exception
    assert meta_of(connection) == before


def test_bound_that_is_no_number_is_a_sentence(expert: Expert, expert_command: Command) -> None:
    """A number, or auto."""
    done = expert_command("set", "sql_expert", "--max-staleness", "many")
    assert done.exit_code == 2
    assert "'many' must be a number, or auto" in done.output
    done = expert_command("set", "sql_expert", "--max-staleness", "-1")
    assert str(done.exception) == "max_staleness must be a whole number of at least 0 (updates), not -1"
    assert expert_command("set", "sql_expert", "--max-staleness", "7").exit_code == 0
    said = expert_command("set", "sql_expert", "--max-staleness", "auto")
    assert said.output == "sql_expert: rules 3 are in force: max_staleness 7 -> auto\n"


def test_nothing_is_committed_if_nothing_differs(
    expert: Expert, connection: Connection, expert_command: Command
) -> None:
    """Whoever types it twice is told."""
    assert expert_command("set", "sql_expert", "--lr", "0.5").exit_code == 0
    before = meta_of(connection)
    said = expert_command("set", "sql_expert", "--lr", "0.5")
    assert said.output == "sql_expert: nothing to change, rules 2 say so already\n"
    assert meta_of(connection) == before


@pytest.mark.parametrize("part", ["weights", "decided", "spec"])
def test_damaged_expert_is_not_changed(
    expert: Expert, connection: Connection, expert_command: Command, part: str
) -> None:
    """It is said what is wrong."""
    worker = ScriptedWorker(connection, expert.spec)
    worker.push(0.1)
    serve(expert)
    connection.client.delete(f"fedmoe:{{sql_expert}}:{part}")
    before = meta_of(connection)
    done = expert_command("set", "sql_expert", "--lr", "0.5")
    assert "is damaged" in str(done.exception)
    assert meta_of(connection) == before


def test_rules_that_are_gone_or_no_rules_are_damage(expert: Expert, connection: Connection) -> None:
    """Nobody serves under rules that somebody invented."""
    key = expert.store.keys.meta
    for rules in ("{}", '{"number": 1}', "x"):
        connection.client.hset(key, "rules", rules)
        with pytest.raises(FedMoEError, match="meta lacks a field or is malformed"):
            expert.load()
    connection.client.hdel(key, "rules")
    with pytest.raises(FedMoEError, match="meta lacks a field or is malformed"):
        expert.load()


def test_backup_brings_back_its_rules(
    expert: Expert, connection: Connection, expert_command: Command, tmp_path: Path, redis_url: str
) -> None:
    """With the lines of its log, which tell of earlier ones."""
    expert_command("set", "sql_expert", "--lr", "0.5")
    directory = tmp_path / "backup"
    done = CliRunner().invoke(cli, ["backup", "--redis", redis_url, str(directory)])
    assert done.exit_code == 0, done.output
    expert_command("set", "sql_expert", "--lr", "0.25")
    done = CliRunner().invoke(cli, ["restore", "--redis", redis_url, str(directory), "--replace"])
    assert done.exit_code == 0, done.output
    meta = expert.load().meta
    assert (meta.rules.number, meta.rules.aggregation.lr) == (2, 0.5)
    assert connection.client.xlen(expert.store.keys.log) == 1


def test_explicit_option_that_rules_contradict_is_said(
    connection: Connection, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the command that changes the rule; the aggregator starts, and the operator's change stays."""
    request = SpecRequest(base_model=str(tiny_model_dir), lora=LoraSettings(rank=2))
    ensure_experts(connection, {"a": 1.0}, request)
    change.change_rules(ExpertStore(connection, "a"), {"sync_interval": 30.0, "max_staleness": 5})
    caplog.clear()
    assert ensure_experts(connection, {"a": 1.0}, request) == []
    assert caplog.messages == []
    typed = replace(request, explicit=frozenset({"sync_interval", "max_staleness", "lr"}))
    assert ensure_experts(connection, {"a": 1.0}, typed) == []
    (said,) = caplog.messages
    assert said == (
        "a: rules 2 are in force, and stay so: max_staleness 5, sync_interval 30.0; to have what is asked for here: "
        "fedmoe expert set a --max-staleness auto --sync-interval 10.0"
    )
    assert GatewayStore(connection).meta("a").rules.number == 2


def test_weight_moves_the_gateway(connection: Connection, expert_command: Command) -> None:
    """At the builder's next look; 0 leaves an expert out."""
    a = make_expert(connection, "a", weights=torch.zeros(small_spec().layout.numel))
    b = make_expert(connection, "b")
    builder = GatewayBuilder(connection, GatewaySettings(method="average"), holder="one", lease_s=5.0)
    builder.refresh()
    said = expert_command("weight", "b", "0")
    assert said.output == "b: gateway weight 1 -> 0\n"
    assert builder.refresh()
    loaded = GatewayStore(connection).load()
    assert loaded is not None
    assert GatewayStore(connection).experts() == {"a": 1.0, "b": 0.0}
    for words, sentence in (
        (("weight", "b", "-1"), "No such option"),
        (("weight", "b", "nan"), "the gateway weight must be a number of at least 0, not nan"),
        (("weight", "c", "1"), "there is no expert 'c' at "),
    ):
        done = expert_command(*words)
        assert sentence in (str(done.exception) + done.output)
        assert done.exit_code != 0
    assert a.store.exists()
    assert b.store.exists()


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
    assert str(done.exception) == "expert 'a' is there already: see `fedmoe expert show a`"
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
