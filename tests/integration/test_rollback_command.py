"""`fedmoe expert rollback`: a new version with earlier weights, while all runs."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from consumers.aggregator import ExpertServer
from consumers.expert import Expert
from consumers.recovery.write_back import write_back
from consumers.verify import Replay, replay
from fedmoe.cli.main import cli
from fedmoe.cli.status import plain
from fedmoe.errors import FedMoEError, StaleStateError
from fedmoe.protocol.layout import stamped
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.spec import Spec
from fedmoe.settings import AggregatorSettings
from fedmoe.store import rollback
from fedmoe.store.archive import SUFFIX, Anchor, Archive
from fedmoe.store.backup import BackupStore
from fedmoe.store.change import change_rules
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.inspect import Inspector
from fedmoe.store.remove import remove_expert
from fedmoe.tools.backup import Backup, back_up, restore
from tests.errors import raises
from tests.federation import ScriptedWorker, make_expert, meta_of, serve, serving, small_spec
from tests.processes import eventually
from tests.rollback import Snapshot

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]
Command = Callable[..., Result]
NAME = "sql_expert"


class Federation:
    """An expert whose aggregator keeps updates, a worker, and the weights of each version that it has had."""

    def __init__(self, connection: Connection, kept: Path, spec: Spec, name: str = NAME) -> None:
        self.connection, self.kept, self.spec, self.name = connection, kept, spec, name
        self.archive = Archive(kept / name)
        weights = initial_weights(spec.layout, spec.init_seed)
        self.expert = make_expert(connection, name, spec=spec, weights=weights, archive=self.archive)
        self.worker = ScriptedWorker(connection, spec, expert=name)
        self.versions = {0: self.weights()}

    def weights(self) -> bytes:
        """As Redis has them, without their stamp."""
        return stamped(GatewayStore(self.connection).read(self.name)[1], "")

    def train(self, updates: int) -> None:
        """Each is one version."""
        self.expert.load()
        for number in range(updates):
            self.worker.push(0.25 * (number + 1))
            assert serve(self.expert) == ["applied"]
            self.worker.pull()
            self.versions[self.expert.meta.version] = self.weights()

    def replay(self) -> Replay:
        """The replay of the whole log, which is the expert byte for byte."""
        meta, weights, lines = GatewayStore(self.connection).history(self.name)
        done = replay(self.spec, meta, lines, self.archive)
        assert done.problem == ""
        assert done.weights.same_values(weights)
        return done

    def backup(self, directory: Path) -> Path:
        back_up(BackupStore(self.connection), directory)
        return directory


@pytest.fixture(params=["fp32", "int8"])
def federation(connection: Connection, tmp_path: Path, request: pytest.FixtureRequest) -> Federation:
    return Federation(connection, tmp_path / "kept", small_spec(wire_format=request.param))


@pytest.fixture
def kept(tmp_path: Path) -> tuple[str, str]:
    return "--keep-updates", str(tmp_path / "kept")


def refused(done: Result, about: str) -> str:
    """The sentence of a command that refused."""
    assert isinstance(done.exception, FedMoEError), done.output
    assert done.exception.about == about
    assert "\n" not in str(done.exception)
    return str(done.exception)


def test_it_is_a_new_version_with_earlier_weights(
    federation: Federation, connection: Connection, expert_command: Command, kept: tuple[str, str]
) -> None:
    """Nothing decided goes back; the log tells; training goes on; the replay is equal byte for byte."""
    federation.train(4)
    before = federation.expert.store.load()
    said = expert_command("rollback", NAME, "--to", "2", *kept)
    assert said.output == (
        "sql_expert: version 5 has the weights of version 2; updates that were trained on versions 3 to 4 are refused\n"
    )
    after = federation.expert.store.load()
    assert federation.weights() == federation.versions[2]
    assert (after.meta.version, after.meta.applied, after.decided) == (5, 4, before.decided)
    assert after.meta.commit == after.meta.weights_commit != before.meta.commit
    (_, line) = connection.client.xrevrange(federation.expert.store.keys.log, count=1)[0]
    assert set(line) == {b"version", b"rolled_back_to", b"by", b"weights"}
    assert (line[b"version"], line[b"rolled_back_to"], b"@" in line[b"by"]) == (b"5", b"2", True)
    assert federation.replay().rollbacks == 1
    federation.worker.pull()
    federation.train(2)
    assert federation.expert.meta.version == 7
    assert federation.replay().rollbacks == 1


def test_verify_show_and_status_tell(
    federation: Federation,
    connection: Connection,
    expert_command: Command,
    kept: tuple[str, str],
    redis_url: str,
) -> None:
    """In words, and for programs."""
    federation.train(3)
    expert_command("rollback", NAME, "--to", "1", *kept)
    done = CliRunner().invoke(cli, ["verify", "--redis", redis_url, *kept])
    assert done.output == "sql_expert: replayed 4 of 4 versions, 1 of them rollbacks, equal\n"
    told = "version 4 has the weights of version 1; versions 2 to 3 were rolled back"
    assert told in expert_command("show", NAME).output
    shown = json.loads(expert_command("show", "--json", NAME).output)
    assert shown["rolled_back"] == [{"to": 1, "last": 3}]
    assert f"sql_expert: {told}" in plain(Inspector(connection).federation())
    seen = Inspector(connection).federation().to_dict()["experts"][0]
    assert seen["meta"]["rolled_back"]["intervals"] == [[1, 3]]
    assert seen["log"][0]["rolled_back_to"] == "1"


def test_what_was_trained_on_what_is_gone_is_refused(
    federation: Federation, connection: Connection, expert_command: Command, kept: tuple[str, str]
) -> None:
    """An update of an earlier base is decided as ever, and is as stale as versions have passed, the rollback too."""
    early = ScriptedWorker(connection, federation.spec, "early")
    federation.train(1)
    edge = ScriptedWorker(connection, federation.spec, "edge")
    federation.train(1)
    late = ScriptedWorker(connection, federation.spec, "late")
    for worker in (early, edge, late):
        worker.push(1.0)
    federation.worker.train(0.5)
    expert_command("rollback", NAME, "--to", "1", *kept)
    federation.expert.load()
    assert serve(federation.expert) == ["applied", "applied", "refused"]
    decided = federation.expert.store.load().decided
    assert (decided["early"].staleness, decided["edge"].staleness) == (3, 3)
    assert decided["late"].reason == (
        "trained on version 2, which an operator rolled back to version 1 (fedmoe expert rollback); its worker goes on "
        "from the newest version"
    )
    assert not early.pull().replace
    for worker in (late, federation.worker):
        assert worker.pull().rolled_back
        assert worker.local.equal(
            worker.ledger.base
        )  # what it trained, and what int8 rounded away, is dropped
    late.push(1.0)
    assert serve(federation.expert) == ["applied"]
    federation.replay()


def test_from_a_backup(federation: Federation, expert_command: Command, tmp_path: Path) -> None:
    """Whoever has no kept updates; with kept ones, the replay finds the same weights."""
    federation.train(2)
    directory = federation.backup(tmp_path / "backup")
    federation.train(2)
    said = expert_command("rollback", NAME, "--to", "2", "--from", str(directory))
    assert "version 5 has the weights of version 2" in said.output
    assert federation.weights() == federation.versions[2]
    federation.replay()


def test_back_and_forth(federation: Federation, expert_command: Command, kept: tuple[str, str]) -> None:
    """A rollback can be rolled back, a rolled-back version be gone back to, and version 0 too; rules change between."""
    federation.train(3)
    expert_command("rollback", NAME, "--to", "1", *kept)
    change_rules(federation.expert.store, {"lr": 0.5})
    assert (
        "version 5 has the weights of version 3"
        in expert_command("rollback", NAME, "--to", "3", *kept).output
    )
    assert federation.weights() == federation.versions[3]
    federation.worker.pull()
    federation.train(1)
    assert (
        "version 7 has the weights of version 0"
        in expert_command("rollback", NAME, "--to", "0", *kept).output
    )
    assert federation.weights() == federation.versions[0]
    assert (
        "version 8 has the weights of version 4"
        in expert_command("rollback", NAME, "--to", "4", *kept).output
    )
    assert federation.weights() == federation.versions[1]
    assert federation.replay().rollbacks == 4
    assert len(federation.expert.store.load().meta.rolled_back.intervals) == 4


def test_the_gateway_can_be_rolled_back(
    connection: Connection, tmp_path: Path, expert_command: Command, kept: tuple[str, str]
) -> None:
    """It is an expert like any other."""
    gateway = Federation(connection, tmp_path / "kept", small_spec(), GATEWAY)
    gateway.train(2)
    assert expert_command("rollback", GATEWAY, "--to", "1", *kept).exit_code == 0
    assert gateway.weights() == gateway.versions[1]
    gateway.replay()


def test_versions_that_are_kept_are_named(
    federation: Federation, expert_command: Command, kept: tuple[str, str]
) -> None:
    """Where a kept update is missing, later versions can be reached from kept weights only."""
    federation.train(6)
    lines = GatewayStore(federation.connection).history(NAME)[2]
    federation.archive.directory.joinpath(lines[2]["update"] + SUFFIX).unlink()
    said = refused(expert_command("rollback", NAME, "--to", "4", *kept), "to")
    assert (
        said == f"version 4 of sql_expert is not kept in {kept[1]}: log and kept updates give versions 0 to 2"
    )
    digest = federation.archive.keep_weights(federation.versions[5])
    run, seq = lines[4]["run"], int(lines[4]["seq"])
    anchor = {"lineage": federation.expert.meta.lineage, "run": run, "weights": digest, "at": 1.0}
    federation.archive.keep_anchor(Anchor(version=5, seq=seq, **anchor))
    said = refused(expert_command("rollback", NAME, "--to", "3", *kept), "to")
    assert said.endswith("versions 0 to 2 and 5 to 6")
    assert (
        "version 7 has the weights of version 5"
        in expert_command("rollback", NAME, "--to", "5", *kept).output
    )
    assert federation.weights() == federation.versions[5]


def test_replay_that_begins_after_the_version_that_was_gone_back_to(
    federation: Federation, connect: Connect, expert_command: Command, tmp_path: Path
) -> None:
    """An aggregator keeps the weights that a rollback put in place: the updates before may be removed later."""
    federation.train(1)
    directory = federation.backup(tmp_path / "backup")
    federation.train(3)
    lines = GatewayStore(federation.connection).history(NAME)[2]
    digest = federation.archive.keep_weights(federation.versions[3])
    federation.archive.keep_anchor(
        Anchor(
            version=3, lineage=federation.expert.meta.lineage, run=lines[2]["run"], seq=int(lines[2]["seq"]),
            weights=digest, at=1.0,
        )
    )  # fmt: skip
    for line in lines[:2]:
        federation.archive.directory.joinpath(line["update"] + SUFFIX).unlink()
    expert_command("rollback", NAME, "--to", "1", "--from", str(directory))
    meta, _, log = GatewayStore(federation.connection).history(NAME)
    done = replay(federation.spec, meta, log, federation.archive)
    assert done.problem == "version 5: it was rolled back to version 1, whose weights are not kept"
    with serving(connect(), keep_updates=federation.kept) as served:
        eventually("the load", lambda: served.server.is_serving)
    assert (federation.replay().since, federation.replay().rollbacks) == (3, 1)


def test_sentences_of_what_cannot_be(
    federation: Federation,
    connection: Connection,
    expert_command: Command,
    kept: tuple[str, str],
    tmp_path: Path,
) -> None:
    """Each one sentence, and nothing is changed."""
    federation.train(3)
    directory = str(federation.backup(tmp_path / "backup"))
    federation.train(1)
    before = meta_of(connection)

    def roll(name: str, to: str, *where: str) -> Result:
        return expert_command("rollback", name, "--to", to, *where)

    assert "is at version 4: there is nothing to roll back" in refused(roll(NAME, "4", *kept), "to")
    assert "is at version 4, so it cannot be rolled back to version 9" in refused(
        roll(NAME, "9", *kept), "to"
    )
    assert roll(NAME, "-1", *kept).exit_code == 2
    assert "give either" in refused(roll(NAME, "1"), "keep_updates")
    assert "give either" in refused(roll(NAME, "1", *kept, "--from", directory), "keep_updates")
    assert "is not a directory" in refused(roll(NAME, "1", "--keep-updates", "nowhere"), "keep_updates")
    assert "there is no expert 'nobody'" in refused(roll("nobody", "1", *kept), "nobody")
    assert "versions 0" not in refused(roll(NAME, "1", "--keep-updates", str(tmp_path)), "to")
    assert "there is no directory" in refused(roll(NAME, "1", "--from", "nowhere"), "directory")
    said = refused(roll(NAME, "1", "--from", directory), "version")
    assert said == f"the backup {directory} holds version 3 of sql_expert, not version 1"
    assert meta_of(connection) == before
    another = make_expert(connection, "another")
    ScriptedWorker(connection, small_spec(), expert="another").push(0.1)
    assert serve(another) == ["applied"]
    said = refused(roll("another", "0", "--from", directory), "another")
    assert "no expert 'another' in the backup" in said


@pytest.mark.parametrize("other", ["lineage", "spec", "history"])
def test_backup_of_another_expert_or_history(
    federation: Federation, connection: Connection, expert_command: Command, tmp_path: Path, other: str
) -> None:
    """The numbers of versions are the same, and what they name is not."""
    federation.train(1)
    earlier = federation.backup(tmp_path / "earlier")
    federation.train(1)
    directory = federation.backup(tmp_path / "backup")
    if other == "history":
        restore(BackupStore(connection), Backup(earlier), replace=True)
        federation.worker = ScriptedWorker(connection, federation.spec, "somebody")
        federation.train(2)
    else:
        connection.client.flushall()
        spec = federation.spec if other == "lineage" else small_spec(wire_format="bf16")
        federation = Federation(connection, tmp_path / "again", spec)
        federation.train(3)
    before = meta_of(connection)
    said = refused(expert_command("rollback", NAME, "--to", "2", "--from", str(directory)), other)
    assert str(directory) in said
    assert meta_of(connection) == before


def test_removed_damaged_and_lost(
    federation: Federation, connection: Connection, expert_command: Command, kept: tuple[str, str]
) -> None:
    """Nothing is rolled back on top of what is not whole."""
    federation.train(2)
    keys = federation.expert.store.keys
    connection.client.delete(keys.log)
    said = refused(expert_command("rollback", NAME, "--to", "0", *kept), "log")
    assert "start an aggregator, which begins it again" in said
    decided = connection.client.hgetall(keys.decided)
    connection.client.delete(keys.decided)
    assert "is damaged" in refused(expert_command("rollback", NAME, "--to", "0", *kept), NAME)
    connection.client.hset(keys.decided, mapping=decided)
    remove_expert(connection, NAME)
    assert "was removed by an operator" in refused(expert_command("rollback", NAME, "--to", "0", *kept), NAME)


def test_it_waits_for_what_an_aggregator_writes_back(
    federation: Federation, connection: Connection, kept: tuple[str, str]
) -> None:
    """Redis came back older; what an aggregator retains comes first."""
    federation.train(1)
    snapshot = Snapshot.take(connection)
    federation.train(1)
    snapshot.bring_back(connection)
    store = federation.expert.store
    store.claim("one", 2)
    state = rollback.VersionState(
        version=0, lineage=federation.expert.meta.lineage, weights=federation.versions[0]
    )
    store.condition()

    def prepared() -> rollback.Rollback:
        return rollback.prepare(federation.spec, state, by="me", generation=store.connection.generation)

    with raises(StaleStateError, about="rollback"):
        rollback.roll_back(store, prepared())
    assert write_back(federation.expert, on=store.condition().commit)
    assert rollback.roll_back(store, prepared()).version == 3
    federation.replay()


def test_state_is_found_again_over_a_new_connection(
    federation: Federation, connection: Connection, connect: Connect
) -> None:
    """The server may hold another history by then."""
    federation.train(2)
    store, found = ExpertStore(connect(), NAME), []

    def find(spec: Spec) -> rollback.VersionState:
        found.append(1)
        if len(found) == 1:
            connection.client.client_kill_filter(_type="normal", skipme=True)
        lineage = federation.expert.meta.lineage
        return rollback.VersionState(version=1, lineage=lineage, weights=federation.versions[1])

    assert rollback.roll_back_soon(store, find, by="me").version == 3
    assert len(found) == 2


def test_rollback_outlives_a_redis_that_went_back(
    federation: Federation, connection: Connection, connect: Connect, expert_command: Command,
    kept: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The aggregator that has seen it writes it back, with its line; the replay is equal."""
    monkeypatch.setattr("consumers.recovery.settle.CLAIM_WAIT_S", 0.1)
    caplog.set_level(logging.INFO)
    federation.train(2)
    with serving(connect(), lease_s=0.5, keep_updates=federation.kept):
        eventually("it serves", lambda: ": serving from version 2" in caplog.text)
        snapshot = Snapshot.take(connection)
        expert_command("rollback", NAME, "--to", "1", *kept)
        eventually("it has noticed", lambda: ": serving from version 3" in caplog.text)
        assert "rolled the expert back to version 1: version 3 has its weights" in caplog.text
        snapshot.bring_back(connection)
        eventually(
            "it is written back", lambda: federation.expert.store.load().meta.version == 3, timeout_s=10
        )
    assert federation.weights() == federation.versions[1]
    assert federation.replay().rollbacks == 1


def test_rollback_that_a_redis_lost_is_named(
    federation: Federation, connection: Connection, expert_command: Command,
    kept: tuple[str, str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """An aggregator that was started after it does not know the state before; the operator is told."""
    federation.train(2)
    snapshot = Snapshot.take(connection)
    expert_command("rollback", NAME, "--to", "1", *kept)
    fresh = Expert(federation.expert.store, federation.spec, aggregator="fresh")
    fresh.load()
    snapshot.bring_back(connection)
    server = ExpertServer(connection, NAME, AggregatorSettings(), holder="one")
    server.rescue(fresh)
    assert "from before the expert was rolled back to version 1: roll it back again" in caplog.text


def test_backup_and_restore_keep_it(
    federation: Federation,
    connection: Connection,
    expert_command: Command,
    kept: tuple[str, str],
    tmp_path: Path,
) -> None:
    """What was trained on what is gone stays refused, and the log replays over it."""
    federation.train(2)
    late = ScriptedWorker(connection, federation.spec, "late")
    late.push(1.0)
    expert_command("rollback", NAME, "--to", "1", *kept)
    directory = federation.backup(tmp_path / "backup")
    federation.expert.load()
    assert serve(federation.expert) == ["refused"]
    federation.worker.pull()
    federation.train(1)
    restore(BackupStore(connection), Backup(directory), replace=True)
    federation.expert.load()
    late.publish()
    assert serve(federation.expert) == ["refused"]
    assert federation.expert.meta.rolled_back.intervals == ((1, 2),)
    assert federation.replay().rollbacks == 1


def test_large_weights_are_written_in_place(
    federation: Federation, expert_command: Command, kept: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of an aggregator's commit."""
    monkeypatch.setattr("fedmoe.store.chunks.IN_PLACE_BYTES", 1)
    federation.train(2)
    assert expert_command("rollback", NAME, "--to", "1", *kept).exit_code == 0
    assert federation.weights() == federation.versions[1]


def test_rolled_back_expert_is_not_the_next_ones(
    federation: Federation, expert_command: Command, kept: tuple[str, str]
) -> None:
    """An expert that was created again since the state was found is left alone."""
    federation.train(2)
    store, meta = federation.expert.store, federation.expert.meta
    state = rollback.VersionState(version=1, lineage="f" * 16, weights=federation.versions[1])
    store.condition()
    ready = rollback.prepare(federation.spec, state, by="me", generation=store.connection.generation)
    with raises(FedMoEError, about="lineage"):
        rollback.roll_back(store, ready)
    assert replace(store.load().meta) == replace(meta)
