"""`fedmoe expert set`: an operator changes the rules while all runs."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from consumers.create import SpecRequest, ensure_experts
from consumers.expert import Expert
from consumers.recovery.write_back import write_back
from consumers.verify import replay
from fedmoe.cli.main import cli
from fedmoe.errors import DamagedExpertError, FedMoEError, ProtocolError, SettingsError, StaleStateError
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.rules import RuleSet, TrainingSettings
from fedmoe.store import change
from fedmoe.store.archive import Archive
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.remove import remove_expert
from producers import heartbeat
from tests.counting import CountingWorker, counting_spec, create_expert
from tests.errors import raises
from tests.federation import ScriptedWorker, make_expert, meta_of, serve, serving, small_spec
from tests.processes import eventually
from tests.rollback import Snapshot

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]
Command = Callable[..., Result]


@pytest.fixture
def expert(connection: Connection) -> Expert:
    spec = small_spec()
    return make_expert(connection, spec=spec, weights=initial_weights(spec.layout, spec.init_seed))


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


def test_idle_aggregator_notices_a_change(
    expert: Expert, connection: Connection, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """Within a lease, although nothing waits: what it retains, and would write back, is under the rules in force."""
    caplog.set_level(logging.INFO)
    with serving(connect(), lease_s=0.5):
        eventually("it serves", lambda: ": serving from version 0, under rules 1" in caplog.text)
        change.change_rules_soon(ExpertStore(connection, "sql_expert"), {"lr": 0.5})
        eventually("it has noticed", lambda: ": serving from version 0, under rules 2" in caplog.text)
    assert "an operator changed the rules: lr 1 -> 0.5 (rules 2 from version 0 on)" in caplog.text


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
        worker.trainer.adopt = adopted.append
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
    ("words", "about"),
    [
        (["nobody", "--lr", "0.5"], "nobody"),
        (["merged", "--lr", "0.5"], "expert"),
        (["gateway", "--train", "both"], "train"),
        (
            ["sql_expert"],
            "rules",
        ),
        (["sql_expert", "--lr", "0"], "lr"),
        (["sql_expert", "--lr", "nan"], "lr"),
        (
            ["sql_expert", "--batch-size", "0"],
            "batch_size",
        ),
        (
            ["sql_expert", "--decay-a", "-1"],
            "decay_a",
        ),
    ],
)
def test_change_that_cannot_be_is_a_sentence(
    expert: Expert, connection: Connection, expert_command: Command, words: list[str], about: str
) -> None:
    """And changes nothing."""
    before = meta_of(connection)
    done = expert_command("set", *words)
    assert isinstance(done.exception, FedMoEError)
    assert done.exception.exit_code == 2
    with raises(FedMoEError, about=about):
        raise done.exception
    assert meta_of(connection) == before


def test_bound_that_is_no_number_is_a_sentence(expert: Expert, expert_command: Command) -> None:
    """A number, or auto."""
    done = expert_command("set", "sql_expert", "--max-staleness", "many")
    assert done.exit_code == 2
    assert "'many' must be a whole number, or auto" in done.output
    done = expert_command("set", "sql_expert", "--max-staleness", "-1")
    assert (
        str(done.exception)
        == "max_staleness must be a whole number of at least 0 and at most 1,000,000,000 (updates), not -1"
    )
    assert expert_command("set", "sql_expert", "--max-staleness", "7").exit_code == 0
    said = expert_command("set", "sql_expert", "--max-staleness", "auto")
    assert said.output == "sql_expert: rules 3 are in force: max_staleness 7 -> auto\n"


def test_a_rule_without_effect_is_said(
    expert: Expert, connection: Connection, tiny_model_dir: Path, expert_command: Command,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """`expert set` says so, also if nothing changed; so do `expert add` and an aggregator that creates the expert."""
    sentence = "server_momentum has no effect until server_optimizer is nesterov; it is sgd"
    for _ in range(2):
        said = expert_command("set", "sql_expert", "--server-momentum", "0.9").output.splitlines()
        assert said[1:] == [f"sql_expert: {sentence}"]
    assert "effect" not in expert_command("set", "sql_expert", "--server-optimizer", "nesterov").output
    added = expert_command("add", "b", "--server-momentum", "0.8", "--server-optimizer", "sgd").output
    assert f"b: {sentence}\n" in added
    remove_expert(connection, "sql_expert")
    remove_expert(connection, "b")
    rules = RuleSet().changed({"server_momentum": 0.9})
    wanted = SpecRequest(base_model=str(tiny_model_dir), rules=rules, explicit=frozenset({"server_momentum"}))
    ensure_experts(connection, {"a": 1.0}, wanted)
    assert caplog.messages.count(f"a: {sentence}") == 1


def test_environment_and_configuration_change_no_rules(
    expert: Expert, connection: Connection, redis_url: str, tmp_path: Path
) -> None:
    """A rule that stands there would change with each change of another rule: the command refuses it."""
    config = tmp_path / "fedmoe.toml"
    config.write_text("[expert.set]\nlr = 0.25\n")
    before = meta_of(connection)
    words = ["expert", "set", "--redis", redis_url, "sql_expert", "--sync-interval", "20"]
    for command, environment in (
        (["--config", str(config), *words], {}),
        (words, {"FEDMOE_EXPERT_SET_LR": "0.25"}),
    ):
        done = CliRunner(env=environment).invoke(cli, command, auto_envvar_prefix="FEDMOE")
        assert str(done.exception).startswith(
            "lr comes from the environment or the configuration file: name the rules"
        )
        assert str(done.exception).endswith("would also change lr")
        assert isinstance(done.exception, SettingsError)
    assert meta_of(connection) == before


def test_change_waits_for_what_an_aggregator_writes_back(expert: Expert, connection: Connection) -> None:
    """Redis came back older: a change on top of that would keep the newer state from being written back."""
    snapshot = Snapshot.take(connection)
    worker = ScriptedWorker(connection, expert.spec)
    worker.push(0.1)
    assert serve(expert) == ["applied"]
    snapshot.bring_back(connection)
    expert.store.claim("one", 1)
    with raises(StaleStateError, about="rollback"):
        change.change_rules(expert.store, {"lr": 0.5})
    assert write_back(expert, on=expert.store.condition().commit)
    assert change.change_rules(expert.store, {"lr": 0.5})[1].number == 2


def test_change_does_not_hide_that_the_log_was_lost(
    expert: Expert, connection: Connection, connect: Connect, tmp_path: Path
) -> None:
    """The next aggregator begins it again, with weights that a replay can begin with."""
    worker = ScriptedWorker(connection, expert.spec)
    with serving(connect(), keep_updates=tmp_path):
        worker.push(0.1)
        eventually("version 1", lambda: expert.store.load().meta.version == 1)
        worker.pull()
    connection.client.delete(expert.store.keys.log)
    change.change_rules(expert.store, {"lr": 0.5})
    with serving(connect(), keep_updates=tmp_path):
        worker.push(0.1)
        eventually("version 2", lambda: expert.store.load().meta.version == 2)
    assert_replay_is_equal(connection, tmp_path)


def test_rules_that_need_more_are_no_damage(expert: Expert, connection: Connection) -> None:
    """The sentence says to upgrade, not to restore a backup."""
    needs = replace(expert.meta.rules, requires="momentum").to_json()
    connection.client.hset(expert.store.keys.meta, "rules", needs)
    for read in (expert.load, lambda: change.change_rules(expert.store, {"lr": 0.5})):
        with raises(ProtocolError, about="requires"):
            read()


def test_expert_of_the_protocol_before_is_no_damage(expert: Expert, connection: Connection) -> None:
    """Its rules stood in its spec."""
    connection.client.hset(expert.store.keys.meta, "protocol", "3")
    connection.client.hdel(expert.store.keys.meta, "rules")
    with raises(ProtocolError, about="protocol"):
        expert.load()


def test_rules_of_any_length_are_shown(
    expert: Expert, connection: Connection, expert_command: Command
) -> None:
    """Other texts of meta are cut short for people; these are read."""
    longest = {name: value for name, value in RuleSet().settings().items() if isinstance(value, float)}
    change.change_rules(expert.store, dict.fromkeys(longest, 1 / 3))
    assert len(expert.load().meta.rules.to_json()) > 300
    assert expert_command("list").exit_code == 0


def test_idle_worker_notices_a_shorter_interval(
    connection: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks now and then, although its next update is an hour away."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_INTERVAL_S", 0.1)
    spec = counting_spec()
    store = create_expert(connection, spec, sync_interval_s=3600.0)
    with serving(connect()), CountingWorker(connect(), spec) as worker:
        eventually("some steps", lambda: worker.steps > 3)
        assert worker.sync.status.published == 0
        change.change_rules_soon(store, {"sync_interval": 0.05})
        eventually("updates", lambda: worker.sync.status.published > 3, timeout_s=10)


def test_nothing_is_committed_if_nothing_differs(
    expert: Expert, connection: Connection, expert_command: Command
) -> None:
    """The second of two equal commands says so and writes nothing."""
    assert expert_command("set", "sql_expert", "--lr", "0.5").exit_code == 0
    before = meta_of(connection)
    said = expert_command("set", "sql_expert", "--lr", "0.5")
    assert said.output == "sql_expert: nothing to change, rules 2 have these values already\n"
    assert meta_of(connection) == before


@pytest.mark.parametrize("part", ["weights", "decided", "spec"])
def test_damaged_expert_is_not_changed(
    expert: Expert, connection: Connection, expert_command: Command, part: str
) -> None:
    """The sentence names the damage."""
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
        with raises(DamagedExpertError, about="sql_expert") as caught:
            expert.load()
        assert caught.value.damage.startswith("its meta lacks a field or is malformed")
    connection.client.hdel(key, "rules")
    with raises(DamagedExpertError, about="sql_expert") as caught:
        expert.load()
    assert caught.value.damage.startswith("its meta lacks a field or is malformed")


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
        "a: rules 2 stay in force: max_staleness 5, sync_interval 30.0; to change them as requested here: "
        "fedmoe expert set a --max-staleness auto --sync-interval 10.0"
    )
    assert GatewayStore(connection).meta("a").rules.number == 2
