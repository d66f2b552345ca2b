"""`fedmoe expert rollback`: what it refuses, in one sentence each, and that nothing is changed then."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result

from fedmoe.errors import FedMoEError
from fedmoe.store import rollback
from fedmoe.store.archive import SUFFIX, Anchor
from fedmoe.store.backup import BackupStore
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.remove import remove_expert
from fedmoe.tools.backup import Backup, restore
from tests.errors import raises
from tests.federation import ScriptedWorker, make_expert, meta_of, serve, small_spec
from tests.kept_expert import NAME, KeptExpert

pytestmark = pytest.mark.one_server

Command = Callable[..., Result]


@pytest.fixture(params=["fp32", "int8"])
def federation(connection: Connection, tmp_path: Path, request: pytest.FixtureRequest) -> KeptExpert:
    return KeptExpert(connection, tmp_path / "kept", small_spec(wire_format=request.param))


@pytest.fixture
def kept(tmp_path: Path) -> tuple[str, str]:
    return "--keep-updates", str(tmp_path / "kept")


def refused(done: Result, about: str) -> str:
    """The sentence of a command that refused."""
    assert isinstance(done.exception, FedMoEError), done.output
    assert done.exception.about == about
    assert "\n" not in str(done.exception)
    return str(done.exception)


def test_versions_that_are_kept_are_named(
    federation: KeptExpert, expert_command: Command, kept: tuple[str, str]
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


def test_sentences_of_what_cannot_be(
    federation: KeptExpert,
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
    federation: KeptExpert, connection: Connection, expert_command: Command, tmp_path: Path, other: str
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
        federation = KeptExpert(connection, tmp_path / "again", spec)
        federation.train(3)
    before = meta_of(connection)
    said = refused(expert_command("rollback", NAME, "--to", "2", "--from", str(directory)), other)
    assert str(directory) in said
    assert meta_of(connection) == before


def test_removed_damaged_and_lost(
    federation: KeptExpert, connection: Connection, expert_command: Command, kept: tuple[str, str]
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


def test_rolled_back_expert_is_not_the_next_ones(
    federation: KeptExpert, expert_command: Command, kept: tuple[str, str]
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
