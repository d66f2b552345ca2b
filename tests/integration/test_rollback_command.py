"""`fedmoe expert rollback`: a new version with earlier weights, while all runs."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from consumers.aggregator import ExpertServer
from consumers.expert import Expert
from consumers.recovery.write_back import write_back
from consumers.verify import replay
from fedmoe.cli.main import cli
from fedmoe.cli.status import plain
from fedmoe.errors import StaleStateError
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.validation import Measured
from fedmoe.settings import AggregatorSettings
from fedmoe.store import rollback
from fedmoe.store.archive import SUFFIX, Anchor
from fedmoe.store.backup import BackupStore
from fedmoe.store.change import change_rules, change_rules_soon
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.inspect import Inspector
from fedmoe.tools.backup import Backup, restore
from producers import heartbeat
from tests.counting import CountingWorker, counting_spec, create_expert
from tests.errors import raises
from tests.federation import ScriptedWorker, serve, serving, small_spec
from tests.kept_expert import NAME, KeptExpert
from tests.processes import eventually
from tests.rollback import Snapshot

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]
Command = Callable[..., Result]


@pytest.fixture(params=["fp32", "int8"])
def federation(connection: Connection, tmp_path: Path, request: pytest.FixtureRequest) -> KeptExpert:
    return KeptExpert(connection, tmp_path / "kept", small_spec(wire_format=request.param))


@pytest.fixture
def kept(tmp_path: Path) -> tuple[str, str]:
    return "--keep-updates", str(tmp_path / "kept")


def test_it_is_a_new_version_with_earlier_weights(
    federation: KeptExpert, connection: Connection, expert_command: Command, kept: tuple[str, str]
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
    federation: KeptExpert,
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


def test_losses_of_before_it_are_not_shown(
    federation: KeptExpert, connection: Connection, expert_command: Command, kept: tuple[str, str]
) -> None:
    """The best version is none that was rolled back, and the first loss measured since is the best."""

    def measure(loss: float, version: int) -> None:
        measured = Measured(loss=loss, version=version, rows=8, rows_set="a")
        federation.worker.push(0.25, **measured.fields)
        federation.expert.load()
        assert serve(federation.expert) == ["applied"]
        federation.worker.pull()

    measure(1.5, 0)
    measure(1.0, 1)
    assert Inspector(connection).federation().experts[0].best_version == 1
    expert_command("rollback", NAME, "--to", "0", *kept)
    view = Inspector(connection).federation().experts[0]
    assert (view.curves, view.best_version) == ((), None)
    federation.worker.pull()
    measure(2.0, 3)
    view = Inspector(connection).federation().experts[0]
    assert [str(curve) for curve in view.curves] == ["alice 2.0000 at version 3, its best"]
    assert view.best_version == 3


def test_what_was_trained_on_what_is_gone_is_refused(
    federation: KeptExpert, connection: Connection, expert_command: Command, kept: tuple[str, str]
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


def test_from_a_backup(federation: KeptExpert, expert_command: Command, tmp_path: Path) -> None:
    """Whoever has no kept updates; with kept ones, the replay finds the same weights."""
    federation.train(2)
    directory = federation.backup(tmp_path / "backup")
    federation.train(2)
    said = expert_command("rollback", NAME, "--to", "2", "--from", str(directory))
    assert "version 5 has the weights of version 2" in said.output
    assert federation.weights() == federation.versions[2]
    federation.replay()


def test_back_and_forth(federation: KeptExpert, expert_command: Command, kept: tuple[str, str]) -> None:
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
    gateway = KeptExpert(connection, tmp_path / "kept", small_spec(), GATEWAY)
    gateway.train(2)
    assert expert_command("rollback", GATEWAY, "--to", "1", *kept).exit_code == 0
    assert gateway.weights() == gateway.versions[1]
    gateway.replay()


def test_replay_that_begins_after_the_version_that_was_gone_back_to(
    federation: KeptExpert, connect: Connect, expert_command: Command, tmp_path: Path
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


def test_it_waits_for_what_an_aggregator_writes_back(
    federation: KeptExpert, connection: Connection, kept: tuple[str, str]
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
    federation: KeptExpert, connection: Connection, connect: Connect
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
    federation: KeptExpert, connection: Connection, connect: Connect, expert_command: Command,
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
    federation: KeptExpert, connection: Connection, expert_command: Command,
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
    federation: KeptExpert,
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


def test_idle_worker_notices(
    connection: Connection, connect: Connect, tmp_path: Path, expert_command: Command, kept: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """It looks now and then, although its next update is an hour away, and drops what it trained for nothing."""
    monkeypatch.setattr(heartbeat, "HEARTBEAT_INTERVAL_S", 0.1)
    spec = counting_spec()
    store = create_expert(connection, spec, sync_interval_s=0.02)
    with serving(connect(), keep_updates=tmp_path / "kept"), CountingWorker(connect(), spec) as worker:
        eventually("some updates", lambda: store.load().meta.version > 3)
        change_rules_soon(store, {"sync_interval": 3600.0})
        eventually(
            "the last decision", lambda: not worker.sync.ledger.queue and worker.exchange.steps_left > 9
        )
        assert expert_command("rollback", NAME, "--to", "1", *kept).exit_code == 0
        eventually("the pull", lambda: worker.sync.ledger.meta.rolled_back.intervals, timeout_s=10)
    assert f"an operator rolled expert '{NAME}' back to version 1" in caplog.text


def test_large_weights_are_written_in_place(
    federation: KeptExpert, expert_command: Command, kept: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of an aggregator's commit."""
    monkeypatch.setattr("fedmoe.store.chunks.IN_PLACE_BYTES", 1)
    federation.train(2)
    assert expert_command("rollback", NAME, "--to", "1", *kept).exit_code == 0
    assert federation.weights() == federation.versions[1]
