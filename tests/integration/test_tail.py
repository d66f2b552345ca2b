"""Snapshot and tail on a real server: all readers get the same bits, and whatever writes the weights ends the tail."""

import base64
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from consumers.aggregator import ExpertServer
from consumers.compaction import QUIET_INTERVALS, compact
from consumers.expert import Expert
from consumers.recovery.write_back import write_back
from consumers.rollback import state_from_updates
from consumers.verify import replay
from fedmoe.errors import DamagedExpertError, SpecError
from fedmoe.protocol.features import COPIES, TAIL
from fedmoe.protocol.layout import digest_of, values_of
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.records import Meta
from fedmoe.protocol.rules import ADAPTIVE, NESTEROV, SGD
from fedmoe.settings import AggregatorSettings
from fedmoe.store.archive import Archive
from fedmoe.store.backup import BackupStore
from fedmoe.store.change import change_rules
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.remove import remove_expert
from fedmoe.store.rollback import roll_back_soon
from tests.errors import raises
from tests.federation import ScriptedWorker, aggregating, make_expert, serve, serving, small_spec
from tests.processes import eventually
from tests.protocol.actors import OneTurn, TurnOver
from tests.strategies import randn

NAME = "sql_expert"
GOLDEN = Path(__file__).parent.parent / "golden"
OPTIMIZERS = pytest.mark.parametrize("optimizer", [SGD, NESTEROV, ADAPTIVE])


def begin(connection: Connection, directory: Path, optimizer: str = SGD, wire_format: str = "int4") -> Expert:
    spec = small_spec(wire_format=wire_format)
    return make_expert(
        connection, spec=spec, weights=initial_weights(spec.layout, spec.init_seed),
        archive=Archive(directory / NAME), rules=aggregating(server_optimizer=optimizer),
    )  # fmt: skip


def train(expert: Expert, updates: int, *, seed: int = 0, name: str = "alice") -> ScriptedWorker:
    worker = ScriptedWorker(expert.store.connection, expert.spec, name)
    for number in range(updates):
        worker.push(0.1 * randn(seed + number, expert.spec.layout.numel))
        assert serve(expert) == ["applied"]
        worker.pull()
    return worker


def roll_back_to_1(expert: Expert, directory: Path) -> None:
    """An operator rolls the expert back to version 1."""

    def find(spec: object) -> object:
        return state_from_updates(expert.store.connection, NAME, expert.spec, to=1, directory=directory)

    roll_back_soon(expert.store, find, by="operator")


def meta_of(expert: Expert) -> Meta:
    return Meta.from_hash(expert.store.connection.client.hgetall(expert.store.keys.meta))


def copies_of(expert: Expert) -> list[str]:
    """The keys of the copied parts in Redis."""
    found = expert.store.connection.client.scan_iter(expert.store.keys.tail_part("*", "*"))
    return sorted(key.decode() for key in found)


def check_readers(expert: Expert, directory: Path) -> None:
    """Each reader gets what the aggregator's memory holds, bit for bit."""
    weights, state = bytes(expert.buffer.file), expert.held.state_file
    state = None if state is None else bytes(state)
    store = GatewayStore(expert.store.connection)
    meta, exact, lines, _ = store.whole_history(NAME)
    assert (exact.weights, exact.server_state) == (weights, state)
    assert store.read(NAME)[1] == weights
    heir = Expert(expert.store, expert.spec, aggregator="heir")
    heir.load()
    assert bytes(heir.buffer.file) == weights
    backup = BackupStore(expert.store.connection).read(NAME)
    assert (backup.weights, backup.server_state) == (weights, state)
    assert backup.check(NAME)[1].requires == ""
    worker = ScriptedWorker(expert.store.connection, expert.spec, "reader")
    pulled = b"".join(worker.store.pull_exact(expert.spec).exact)
    assert pulled == values_of(expert.spec.layout, weights).numpy().tobytes()
    done = replay(expert.spec, meta, lines, Archive(directory / NAME, read_only=True))
    assert done.problem == ""
    assert done.same_values(exact.weights, exact.server_state)


@OPTIMIZERS
def test_all_readers_get_the_same_bits(connection: Connection, tmp_path: Path, optimizer: str) -> None:
    """With a tail, and without one; the weights are written now and then."""
    expert, lengths = begin(connection, tmp_path, optimizer), set()
    for number in range(4):
        train(expert, 1, seed=number, name=f"w{number}")
        lengths.add(connection.client.hlen(expert.store.keys.tail))
        check_readers(expert, tmp_path)
    assert len(lengths) > 1
    compact(expert)
    check_readers(expert, tmp_path)


def test_meta_says_which_weights_lie_there(connection: Connection, tmp_path: Path) -> None:
    """And requires that a reader knows tails, as long as there is one."""
    expert = begin(connection, tmp_path)
    first = connection.client.get(expert.store.keys.weights)
    train(expert, 1)
    meta = meta_of(expert)
    assert (meta.version, meta.tail.snapshot_version, meta.requires) == (1, 0, f"{COPIES} {TAIL}")
    assert connection.client.get(expert.store.keys.weights) == first
    assert connection.client.hkeys(expert.store.keys.tail) == [b"1"]
    [copy] = copies_of(expert)
    assert connection.client.pttl(copy) == -1
    compact(expert)
    after = meta_of(expert)
    assert (after.requires, bool(after.tail)) == ("", False)
    assert after.weights_commit == meta.weights_commit
    assert after.commit != meta.commit
    assert not connection.client.exists(expert.store.keys.tail, copy)


def test_weights_are_written_in_a_quiet_time(connection: Connection, tmp_path: Path) -> None:
    """By the aggregator that holds the lease; not before."""
    expert = begin(connection, tmp_path)
    now = 1000.0
    server = ExpertServer(connection, NAME, AggregatorSettings(block_ms=1), holder="one", clock=lambda: now)

    def turn() -> None:
        with pytest.raises(TurnOver):
            server.run(OneTurn())

    turn()
    worker = ScriptedWorker(connection, expert.spec)
    worker.push(0.1)
    turn()
    quiet = QUIET_INTERVALS * meta_of(expert).rules.sync_interval_s
    now += quiet - 1
    connection.client.xadd(expert.store.keys.updates, {"no": "update"})
    turn()
    assert meta_of(expert).tail
    now += 2
    turn()
    assert not meta_of(expert).tail
    worker.pull()
    worker.push(0.1)
    turn()
    assert meta_of(expert).tail.snapshot_version == 1


@OPTIMIZERS
def test_whatever_writes_the_weights_ends_the_tail(
    connection: Connection, tmp_path: Path, optimizer: str
) -> None:
    """A rollback, a restore, a write-back to an emptied Redis; each goes on from there."""
    expert = begin(connection, tmp_path, optimizer)
    keys = expert.store.keys
    train(expert, 2)
    backup = BackupStore(connection).read(NAME)

    def rolled_back() -> None:
        roll_back_to_1(expert, tmp_path)

    def restored() -> None:
        BackupStore(connection).write(NAME, backup, gateway_weight="1", replace=True)

    def written_back() -> None:
        connection.client.flushall()
        assert write_back(expert, on="")

    for number, change in enumerate((rolled_back, restored, written_back)):
        expert.load()
        train(expert, 1, seed=20 * number, name=f"w{number}")
        if not meta_of(expert).tail:
            train(expert, 1, seed=20 * number + 1, name=f"v{number}")
        assert meta_of(expert).tail
        assert copies_of(expert)
        change()
        assert not connection.client.exists(keys.tail)
        assert not meta_of(expert).tail
        assert copies_of(expert) == []
        expert.load()
        assert digest_of(connection.client.get(keys.weights)) == digest_of(bytes(expert.buffer.file))
    train(expert, 2, seed=90, name="last")
    remove_expert(connection, NAME)
    assert not connection.client.exists(keys.tail)
    assert copies_of(expert) == []


def test_change_of_rules_keeps_the_tail(connection: Connection, tmp_path: Path) -> None:
    """Updates of the tail are folded as they were decided."""
    expert = begin(connection, tmp_path, NESTEROV)
    train(expert, 1)
    change_rules(expert.store, {"server_momentum": 0.9, "lr": 0.5})
    expert.load()
    assert meta_of(expert).tail
    check_readers(expert, tmp_path)
    train(expert, 1, seed=9, name="bob")
    check_readers(expert, tmp_path)


@pytest.mark.parametrize("lost", ["the field 1", "part 0 of the update of version 1"])
def test_a_removed_part_is_said_in_one_sentence(connection: Connection, tmp_path: Path, lost: str) -> None:
    """By all readers; an aggregator that retains the expert writes it back, and nothing is lost."""
    expert = begin(connection, tmp_path)
    train(expert, 1)
    retained = bytes(expert.buffer.file)
    if "field" in lost:
        connection.client.hdel(expert.store.keys.tail, "1")
    else:
        connection.client.delete(*copies_of(expert))
    heir = Expert(expert.store, expert.spec, aggregator="heir")
    reader = ScriptedWorker(connection, expert.spec, "reader")
    for read in (
        heir.load, lambda: GatewayStore(connection).read(NAME), lambda: BackupStore(connection).read(NAME),
        lambda: reader.store.pull_exact(expert.spec),
    ):  # fmt: skip
        with raises(DamagedExpertError, about=NAME) as caught:
            read()
        assert f"its tail lacks {lost}" in str(caught.value)
    assert not expert.store.is_unchanged(expert.meta, n_decided=len(expert.decided))
    found = expert.store.condition()
    assert "its tail has" in found.damage
    assert write_back(expert, on=found.commit)
    heir.load()
    assert digest_of(bytes(heir.buffer.file)) == digest_of(retained)


def test_a_lost_server_state_from_which_the_tail_goes_on_is_noticed(
    connection: Connection, tmp_path: Path
) -> None:
    """While the expert is served, as a lost part of the tail is; not if the tail began with a new one."""
    expert = begin(connection, tmp_path, NESTEROV)

    def is_unchanged() -> bool:
        return expert.store.is_unchanged(expert.meta, n_decided=len(expert.decided))

    train(expert, 1)
    assert meta_of(expert).tail.state == "new"
    assert is_unchanged()
    compact(expert)
    train(expert, 1, seed=1, name="bob")
    assert meta_of(expert).tail.state == "snapshot"
    assert is_unchanged()
    connection.client.delete(expert.store.keys.server_state)
    assert not is_unchanged()


@pytest.mark.parametrize("changes_rules", [False, True])
@pytest.mark.parametrize("overwritten", ["tail", "weights", "server_state"])
def test_memory_mends_what_only_a_whole_read_finds(
    connection: Connection,
    connect: Callable[[], Connection],
    tmp_path: Path,
    overwritten: str,
    changes_rules: bool,
) -> None:
    """As long as the aggregator that served it lives: also if an operator changes the rules meanwhile."""
    expert = begin(connection, tmp_path, NESTEROV)
    train(expert, 1)
    compact(expert)
    worker = train(expert, 1, seed=1, name="bob")
    keys, last = expert.store.keys, expert.spec.layout.file_bytes - 4
    with serving(connect(), memory=expert) as served:
        eventually("it serves", lambda: served.server.is_serving)
        worker.push(0.1 * randn(3, expert.spec.layout.numel))
        eventually("a tail", lambda: meta_of(expert).version == 3 and bool(meta_of(expert).tail))
        weights = GatewayStore(connection).read(NAME)[1]  # Redis has them before the aggregator's memory
        if overwritten == "tail":
            connection.client.set(copies_of(expert)[0], "x")
        elif overwritten == "weights":
            connection.client.setrange(keys.weights, last, b"\0\0\x80\x3f")
        else:
            connection.client.delete(keys.server_state)
        if changes_rules:
            change_rules(expert.store, {"lr": 0.5})
        else:
            connection.client.client_kill_filter(_type="normal", skipme=True)  # so that it looks again
        eventually("whole", lambda: not expert.store.whole_condition().damage, timeout_s=10)
        assert GatewayStore(connection).read(NAME)[1][-16:] == weights[-16:]
        assert meta_of(expert).rules.aggregation.lr == (0.5 if changes_rules else 1.0)


def test_a_tail_of_another_type_is_said(connection: Connection, tmp_path: Path) -> None:
    """Before a commit: its HSET would fail in the middle of the EXEC."""
    expert = begin(connection, tmp_path)
    train(expert, 1)
    connection.client.set(expert.store.keys.tail, "overwritten")
    with raises(SpecError, about="tail"):
        expert.load()
    ScriptedWorker(connection, expert.spec).push(0.1)
    with raises(SpecError, about="tail"):
        serve(expert)


def test_a_key_where_no_tail_is_expected_stops_nobody(connection: Connection, tmp_path: Path) -> None:
    """Of any type: the next commit removes it."""
    expert = begin(connection, tmp_path)
    connection.client.set(expert.store.keys.tail, "overwritten")
    expert.load()
    train(expert, 1)
    assert connection.client.type(expert.store.keys.tail) == b"hash"
    check_readers(expert, tmp_path)


def test_what_an_earlier_release_left_of_a_tail_is_removed(connection: Connection, tmp_path: Path) -> None:
    """Its `restore --replace` knows no tail: the next commit begins a new one."""
    expert = begin(connection, tmp_path)
    connection.client.hset(expert.store.keys.tail, mapping={"1:7": "left", "left": "behind"})
    train(expert, 1)
    assert connection.client.hkeys(expert.store.keys.tail) == [b"1"]
    check_readers(expert, tmp_path)


def kept_state(connection: Connection, name: str) -> dict[str, Any]:
    """Puts back what an earlier release left in Redis; returns what is known of it."""
    kept: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    keys = connection.keys.expert(NAME)
    for key, dump in kept["keys"].items():
        connection.client.restore(getattr(keys, key), 0, base64.b64decode(dump))
    state = BackupStore(connection).read(NAME)
    assert state.server_state is not None
    digests = digest_of(state.weights), digest_of(state.server_state)
    assert digests == (kept["weights"], kept["server_state"])
    return kept


def test_an_expert_of_the_release_before_tails(connection: Connection, tmp_path: Path) -> None:
    """A real dump of it is read as it is, goes on with a tail, and is as before without one."""
    kept, keys = kept_state(connection, "expert-before-tails"), connection.keys.expert(NAME)
    before = connection.client.hgetall(keys.meta)
    spec = GatewayStore(connection).spec(NAME)
    server = ExpertServer(connection, NAME, AggregatorSettings(burst=True, block_ms=1), holder="one")
    server.run(threading.Event())
    expert = server.retained
    assert expert is not None
    assert (expert.meta.version, digest_of(bytes(expert.buffer.file))) == (kept["version"], kept["weights"])
    train(expert, 1, name="carol")
    assert meta_of(expert).tail.snapshot_version == kept["version"]
    heir = Expert(expert.store, spec, aggregator="heir")
    heir.load()
    assert torch.equal(heir.buffer.flat, expert.buffer.flat)
    compact(expert)
    after = connection.client.hgetall(keys.meta)
    assert {field: after[field] for field in after.keys() - before.keys()}.keys() <= {
        b"tail",
        b"parts",
        b"digests",
    }
    assert (after[b"requires"], after[b"tail"]) == (b"", b"")
