"""Weights that are too long for one Redis string: all readers get the same bytes, and no part is left behind."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedmoe
import fedmoe.protocol.features
from consumers.compaction import compact
from consumers.expert import Expert
from consumers.recovery.write_back import write_back
from fedmoe.errors import DamagedExpertError, ProtocolError, RedisUnavailableError, StaleStateError
from fedmoe.protocol.features import PARTS
from fedmoe.protocol.rules import NESTEROV
from fedmoe.store.backup import BackupStore
from fedmoe.store.change import change_rules
from fedmoe.store.connection import Connection, execute
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.inspect import Inspector
from fedmoe.store.lifecycle import new_id
from fedmoe.store.parts import part_keys, stray_parts
from fedmoe.store.remove import remove_expert, sweep
from tests.errors import raises
from tests.federation import ScriptedWorker, serve
from tests.integration.test_tail import NAME, begin, check_readers, meta_of, roll_back_to_1, train
from tests.strategies import randn

pytestmark = pytest.mark.one_server
PART_BYTES = 100


@pytest.fixture(autouse=True)
def _short_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe.protocol.weights_parts.WHOLE_BYTES", 300)
    monkeypatch.setattr("fedmoe.protocol.weights_parts.PART_BYTES", PART_BYTES)


def parts_in(connection: Connection) -> list[str]:
    """All parts in Redis."""
    found = [key.decode() for key in connection.client.scan_iter("fedmoe:{*}:*:*:*")]
    return sorted(key for key in found if ":payload:" not in key and ":tail:" not in key)


def check_parts(expert: Expert) -> None:
    """Those that meta names are there for ever, and no others."""
    client, parts = expert.store.connection.client, meta_of(expert).parts
    named = part_keys(expert.store.keys, parts)
    if not client.exists(expert.store.keys.server_state):
        named = named[: parts.count]
    there = parts_in(expert.store.connection)
    assert there == sorted(named) != []
    assert {client.pttl(name) for name in there} == {-1}
    assert {client.strlen(name) for name in there} <= {PART_BYTES, 4 * expert.spec.layout.numel % PART_BYTES}


@pytest.mark.parametrize("wire_format", ["fp32", "int4"])
def test_all_readers_get_the_same_bytes(connection: Connection, tmp_path: Path, wire_format: str) -> None:
    """With a tail and without, also of the server state."""
    expert = begin(connection, tmp_path, NESTEROV, wire_format)
    check_parts(expert)
    for number in range(3):
        train(expert, 1, seed=number, name=f"w{number}")
        check_readers(expert, tmp_path)
        check_parts(expert)
    if meta_of(expert).tail:
        compact(expert)
    check_readers(expert, tmp_path)
    check_parts(expert)
    assert meta_of(expert).requires == PARTS
    read = fedmoe.connect(connection.settings).expert(NAME).weights()
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == dict(expert.spec.layout.tensors)
    view = Inspector(connection).federation().experts[0]
    assert (view.weights_bytes, view.problems) == (expert.spec.layout.file_bytes, ())


def test_whatever_writes_the_weights_leaves_no_part_behind(connection: Connection, tmp_path: Path) -> None:
    """A rollback, a restore, a change of rules, write-backs with meta and without, a removal."""
    expert = begin(connection, tmp_path, NESTEROV)
    keys = expert.store.keys
    train(expert, 2)
    backup = BackupStore(connection).read(NAME)

    def rolled_back() -> None:
        roll_back_to_1(expert, tmp_path)

    def restored() -> None:
        BackupStore(connection).write(NAME, backup, gateway_weight="1", replace=True)

    def lost_its_meta() -> None:
        connection.client.delete(keys.meta)
        assert write_back(expert, on="")

    def emptied() -> None:
        connection.client.flushall()
        assert write_back(expert, on="")

    def new_rules() -> None:
        change_rules(expert.store, {"lr": 0.5})

    for number, change in enumerate((rolled_back, restored, new_rules, lost_its_meta, emptied)):
        expert.load()
        train(expert, 1, seed=20 * number, name=f"w{number}")
        change()
        expert.load()
        check_parts(expert)
        assert GatewayStore(connection).read(NAME)[1] == bytes(expert.buffer.file)
    remove_expert(connection, NAME)
    assert parts_in(connection) == []


def test_a_lost_part_is_said_in_one_sentence(connection: Connection, tmp_path: Path) -> None:
    """By all readers; an aggregator that retains the expert notices it, and writes it back."""
    expert = begin(connection, tmp_path, wire_format="fp32")
    train(expert, 1)
    heir = Expert(expert.store, expert.spec, aggregator="heir")
    reader = ScriptedWorker(connection, expert.spec, "reader")
    for spoil in (connection.client.delete, lambda key: connection.client.sadd(key, "x")):
        parts = meta_of(expert).parts
        connection.client.delete(lost := expert.store.keys.weights_part(parts.commit, 1))
        spoil(lost)
        for read in (
            heir.load, lambda: GatewayStore(connection).read(NAME), lambda: BackupStore(connection).read(NAME),
            lambda: reader.store.pull_exact(expert.spec), lambda: change_rules(expert.store, {"lr": 0.5}),
        ):  # fmt: skip
            with raises(DamagedExpertError, about=NAME) as caught:
                read()
            assert f"which commit {parts.commit} wrote, one is missing" in str(caught.value)
        assert write_back(expert, on=expert.store.condition().commit)
        heir.load()
        assert heir.buffer.same_values(bytes(expert.buffer.file))
        expert.load()
    connection.client.delete(expert.store.keys.weights_part(meta_of(expert).parts.commit, 1))
    assert not expert.store.is_unchanged(expert.meta, n_decided=1)


def test_a_reader_comes_to_an_end_beside_a_busy_aggregator(
    connection: Connection, connect: Callable[[], Connection], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit removes the parts each time while they are read: then all of them are read at once."""
    expert = begin(connection, tmp_path, wire_format="fp32")
    reader = GatewayStore(connect())
    worker, get, commits = ScriptedWorker(connection, expert.spec), reader.connection.client.get, []

    def get_after_a_commit(key: str) -> Any:
        if key.endswith(":1"):
            worker.push(0.01)
            assert serve(expert) == ["applied"]
            worker.pull()
            commits.append(key)
        return get(key)

    monkeypatch.setattr(reader.connection.client, "get", get_after_a_commit)
    meta, weights = reader.read(NAME)
    assert len(commits) == 3
    assert weights == bytes(expert.buffer.file)
    assert meta.commit == expert.meta.commit


def test_an_aggregator_that_dies_before_its_commit_changes_nothing(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it wrote expires; one that was overtaken writes nothing at all."""
    expert = begin(connection, tmp_path, wire_format="fp32")
    before, named = bytes(expert.buffer.file), parts_in(connection)
    worker = ScriptedWorker(connection, expert.spec)
    worker.push(randn(1, expert.spec.layout.numel))

    def killed(pipe: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fedmoe.store.expert.execute", killed)
        with pytest.raises(KeyboardInterrupt):
            serve(expert)
    orphans = sorted(set(parts_in(connection)) - set(named))
    assert len(orphans) == len(named)
    assert min(connection.client.pttl(key) for key in orphans) > 0
    assert GatewayStore(connection).read(NAME)[1] == before
    connection.client.delete(*orphans)
    change_rules(expert.store, {"lr": 0.5})
    with raises(StaleStateError, about="commit"):
        serve(expert)
    assert parts_in(connection) == named
    expert.load()
    with monkeypatch.context() as patched, raises(StaleStateError, about="commit"):
        patched.setattr("fedmoe.store.expert.execute", lambda pipe: None)
        expert.process(expert.store.reclaim())
    assert parts_in(connection) == named, "what an overtaken commit wrote is removed at once"
    expert.load()
    connection.client.xautoclaim(expert.store.keys.updates, "aggregator", "aggregator", 0)
    expert.process(expert.store.reclaim())
    assert expert.meta.applied == 1
    check_parts(expert)


def test_a_rollback_comes_to_an_end_beside_a_busy_aggregator(
    connection: Connection, connect: Callable[[], Connection], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit comes whenever a part is written: the parts are written once, and no part is left behind."""
    expert = begin(connection, tmp_path, NESTEROV)
    train(expert, 2)
    operator = Expert(ExpertStore(connect(), NAME), expert.spec, aggregator="operator")
    client, written = operator.store.connection.client, []
    worker, write = ScriptedWorker(connection, expert.spec), client.set

    def write_beside_a_commit(key: str, *arguments: Any, **options: Any) -> Any:
        worker.push(0.01)
        assert serve(expert) == ["applied"]
        worker.pull()
        written.append(key)
        return write(key, *arguments, **options)

    monkeypatch.setattr(client, "set", write_beside_a_commit)
    monkeypatch.setattr("fedmoe.store.rollback.PATIENCE_S", 5.0)
    roll_back_to_1(operator, tmp_path)
    assert len(written) == len(set(written)) > 1
    expert.load()
    assert expert.meta.rolled_back.holds(2)
    check_parts(expert)
    assert GatewayStore(connection).read(NAME)[1] == bytes(expert.buffer.file)


@pytest.mark.parametrize("is_swept", [True, False])
def test_a_rollback_that_comes_too_late_removes_its_parts_and_one_that_lost_them_writes_them_again(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_swept: bool
) -> None:
    """The aggregator commits at every attempt; or somebody removes what nothing names yet, once."""
    expert = begin(connection, tmp_path, wire_format="fp32")
    train(expert, 2)
    keys, attempts = expert.store.keys, []

    def overtaken(pipe: Any) -> Any:
        attempts.append(1)
        if not is_swept:
            return None
        if len(attempts) == 1:
            other.client.delete(*stray_parts(other.client, keys, but=meta_of(expert).parts))
        return execute(pipe)

    other = Connection(connection.settings)
    monkeypatch.setattr("fedmoe.store.expert.execute", overtaken)
    monkeypatch.setattr("fedmoe.store.rollback.PATIENCE_S", 5.0 if is_swept else 0.1)
    if is_swept:
        roll_back_to_1(expert, tmp_path)
    else:
        with raises(StaleStateError, about="commit") as caught:
            roll_back_to_1(expert, tmp_path)
        assert "nothing was changed, try again" in str(caught.value)
    assert len(attempts) > 1
    expert.load()
    assert expert.meta.rolled_back.holds(2) is is_swept
    check_parts(expert)
    other.close()


def test_a_removal_takes_all_parts_and_none_of_an_expert_created_meanwhile(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that dies before it sweeps; and parts that nothing names any more are gone with the next creation."""
    expert = begin(connection, tmp_path, wire_format="fp32")
    client, keys = connection.client, expert.store.keys
    client.set(b"fedmoe:{%s}:weights:\xff:0" % NAME.encode(), "x")  # nobody's
    with monkeypatch.context() as patched:
        patched.setattr("fedmoe.store.remove.sweep", lambda *_: ())
        remove_expert(connection, NAME)
    assert list(stray_parts(client, keys)) == []

    def create() -> None:
        meta = replace(expert.meta, commit=(commit := new_id()), weights_commit=commit)
        assert expert.store.create(expert.spec, meta, expert.buffer.file, though_removed=True)

    def listed_before_a_creation(*_: object) -> Iterator[bytes]:
        create()
        yield from stray_parts(client, keys)

    client.set(keys.weights_part("0", 0), "x")  # a commit before the removal made it permanent
    with monkeypatch.context() as patched:
        patched.setattr("fedmoe.store.remove.stray_parts", listed_before_a_creation)
        sweep(connection, NAME)
    check_parts(expert)
    client.delete(keys.meta, keys.weights, keys.decided)
    create()
    check_parts(expert)


def test_one_scan_finds_all_parts_and_nothing_else(connection: Connection) -> None:
    """A scan reads the names of all keys on the server, so one for each kind of part would triple the cost."""
    keys, client = connection.keys.expert(NAME), connection.client
    parts = {keys.weights_part("c", 0), keys.server_state_part("c", 1), keys.tail_part("t", 0)}
    others = {keys.weights, keys.tail, keys.spec, keys.worker("w"), keys.header("w", "1-00000000", 0)}
    for key in (*parts, *others):
        client.set(key, "x")
    before = client.info("commandstats").get("cmdstat_scan", {"calls": 0})["calls"]
    assert {key.decode() for key in stray_parts(client, keys)} == parts
    assert client.info("commandstats")["cmdstat_scan"]["calls"] == before + 1


def test_a_full_redis_gets_no_parts_for_a_restore_that_it_refuses(
    connection: Connection, tmp_path: Path
) -> None:
    """Only commits may go beyond its limit: they free memory."""
    expert = begin(connection, tmp_path, wire_format="fp32")
    store = BackupStore(connection)
    backup, named = store.read(NAME), parts_in(connection)
    connection.client.config_set("maxmemory", 1)
    try:
        with raises(RedisUnavailableError, about="maxmemory"):
            store.write(NAME, backup, gateway_weight="1", replace=True)
        assert parts_in(connection) == named
    finally:
        connection.client.config_set("maxmemory", 0)
    check_parts(expert)


def test_an_earlier_release_refuses_and_a_short_file_stays_one_string(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the limit lies may differ between releases: a reader goes by meta, and the next commit by its own limit."""
    expert = begin(connection, tmp_path, wire_format="fp32")
    with monkeypatch.context() as earlier, raises(ProtocolError, about="requires"):
        earlier.setattr(fedmoe.protocol.features, "FEATURES", fedmoe.protocol.features.FEATURES - {PARTS})
        expert.load()
    monkeypatch.setattr("fedmoe.protocol.weights_parts.WHOLE_BYTES", 10_000)
    check_readers(expert, tmp_path)
    worker = train(expert, 1)
    assert parts_in(connection) == []
    assert connection.client.get(expert.store.keys.weights) == bytes(expert.buffer.file)
    assert (meta_of(expert).requires, bool(meta_of(expert).parts)) == ("", False)
    store = BackupStore(connection)
    short = store.read(NAME)
    monkeypatch.setattr("fedmoe.protocol.weights_parts.WHOLE_BYTES", 300)
    worker.push(0.1)
    assert serve(expert) == ["applied"]
    check_parts(expert)
    check_readers(expert, tmp_path)
    monkeypatch.setattr("fedmoe.protocol.weights_parts.WHOLE_BYTES", 10_000)
    store.write(NAME, short, gateway_weight="1", replace=True)
    assert parts_in(connection) == []
