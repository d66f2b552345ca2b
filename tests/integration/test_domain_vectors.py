"""Domain vectors in Redis: written by the commit that applies their update, and lost or kept with the expert."""

import logging
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from consumers.expert import Expert
from consumers.recovery.write_back import write_back
from fedmoe.cli.main import cli
from fedmoe.errors import SpecError, StaleStateError
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.vectors import WITHHELD, DomainVector
from fedmoe.store.archive import Archive
from fedmoe.store.backup import BackupStore
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.remove import remove_expert
from fedmoe.tools.backup import restore
from tests.backups import backed_up
from tests.errors import raises
from tests.federation import ScriptedWorker, make_expert, serve, small_spec, start_weights

NAME = "sql_expert"


def vector(value: float = 0.5, width: int = 8) -> DomainVector:
    return DomainVector.of(torch.full((width,), value), 40)


def worker_of(expert: Expert, name: str = "alice", tells: DomainVector | None = None) -> ScriptedWorker:
    worker = ScriptedWorker(expert.store.connection, expert.spec, name)
    worker.ledger.vector = tells or vector()
    return worker


def stored(connection: Connection) -> dict[str, str]:
    return {name: text.decode() for name, text in GatewayStore(connection).vectors(NAME).items()}


def test_the_first_applied_update_of_a_process_brings_the_vector(connection: Connection) -> None:
    """One in the header of each update until one is applied; after that none; a new process tells its own."""
    expert = make_expert(connection)
    alice = worker_of(expert)
    first = alice.push(1e6)
    assert serve(expert) == ["refused"]
    assert stored(connection) == {}
    assert first.header.vector == vector().values
    alice.pull()
    alice.local = start_weights()
    assert alice.push(1.0).header.vector == vector().values
    assert serve(expert) == ["applied"]
    assert stored(connection) == {"alice": vector().to_json()}
    alice.pull()
    assert alice.push(1.0).header.vector is None
    assert serve(expert) == ["applied"]
    again = worker_of(expert, tells=vector(0.25))
    again.push(1.0)
    assert serve(expert) == ["applied"]
    assert stored(connection) == {"alice": vector(0.25).to_json()}


def test_a_worker_that_withholds_it_takes_back_what_it_published(connection: Connection) -> None:
    """Only its own; and one that never published anything leaves nothing."""
    expert = make_expert(connection)
    for name in ("alice", "bob"):
        worker_of(expert, name).push(1.0)
    assert serve(expert) == ["applied", "applied"]
    for name in ("alice", "carol"):
        worker_of(expert, name, WITHHELD).push(1.0)
    assert serve(expert) == ["applied", "applied"]
    assert stored(connection) == {"bob": vector().to_json()} == expert.vectors


def test_an_update_of_an_earlier_start_does_not_stand_for_this_one(connection: Connection) -> None:
    """It was made with a vector, waits undecided, and is applied after the start that withholds the vector."""
    expert = make_expert(connection)
    worker = worker_of(expert)
    worker.push(1.0)
    worker.ledger.vector = WITHHELD  # as a start from the checkpoint sets it
    assert serve(expert) == ["applied"]
    worker.pull()
    worker.push(1.0)
    assert serve(expert) == ["applied"]
    assert stored(connection) == {}


@pytest.mark.parametrize("values", [bytes(14), bytes(14) + b"\x00\x7e", bytes(20_000)])
def test_a_vector_that_cannot_be_used_costs_a_sentence_not_the_update(
    connection: Connection, values: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Of another length, not finite, or too large; what was there before stays; said once."""
    expert = make_expert(connection)
    alice = worker_of(expert)
    alice.push(1.0)
    serve(expert)
    odd = worker_of(expert, tells=DomainVector(rows=40, values=values))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            odd.ledger.has_told = False
            odd.push(1.0)
            assert serve(expert) == ["applied"]
            odd.pull()
    assert stored(connection) == {"alice": vector().to_json()}
    assert len([one for one in caplog.messages if "domain vector of worker alice is left out" in one]) == 1


def test_it_is_decided_with_its_batch_or_not_at_all(connection: Connection) -> None:
    """Of a commit that fails, the aggregator retains no vector."""
    expert = make_expert(connection)
    worker_of(expert).push(1.0)
    entries = expert.store.read(block_ms=1, count=9)
    connection.client.hset(connection.keys.expert(NAME).meta, "commit", "another")
    with raises(StaleStateError, about="commit"):
        expert.process(entries)
    assert (stored(connection), expert.vectors) == ({}, {})


def test_a_key_of_the_wrong_type_stops_a_commit_before_it_begins(connection: Connection) -> None:
    """Else its EXEC would fail half way."""
    expert = make_expert(connection)
    connection.client.set(connection.keys.expert(NAME).vectors, "oops")
    worker_of(expert).push(1.0)
    with raises(SpecError, about="vectors"):
        serve(expert)
    with raises(SpecError, about="vectors"):
        expert.load()
    connection.client.delete(connection.keys.expert(NAME).vectors)
    expert.load()
    assert serve(expert) == ["applied"]
    assert stored(connection) == {"alice": vector().to_json()}


def test_an_aggregator_writes_vectors_back_with_the_expert(connection: Connection) -> None:
    """No worker sends its vector again; one that came after the retained state goes."""
    expert = make_expert(connection)
    worker_of(expert).push(1.0)
    serve(expert)
    connection.client.flushdb()
    assert write_back(expert, on="")
    assert stored(connection) == {"alice": vector().to_json()}
    expert.load()
    connection.client.hset(connection.keys.expert(NAME).vectors, "mallory", "x")
    assert write_back(expert, on=expert.meta.commit)
    assert stored(connection) == {"alice": vector().to_json()}


def test_a_worker_tells_it_again_after_a_rollback_beyond_what_it_keeps(connection: Connection) -> None:
    """And to an expert that was created again; resent updates bring their own."""
    expert = make_expert(connection)
    before = {key: connection.client.dump(key) for key in connection.client.scan_iter()}
    alice = worker_of(expert)
    for _ in range(2):
        alice.push(1.0)
        serve(expert)
        alice.pull()
    alice.ledger.start = alice.ledger.kept.pop(0).id  # the one that brought it is kept no more
    connection.client.flushdb()
    for key, content in before.items():
        connection.client.restore(key, 0, content)
    expert.load()
    alice.pull()
    alice.publish()
    assert serve(expert) == ["applied"]
    assert stored(connection) == {}
    alice.pull()
    alice.push(1.0)
    assert serve(expert) == ["applied"]
    assert stored(connection) == {"alice": vector().to_json()}


def test_vectors_go_with_a_removed_expert_and_come_back_with_a_backup(
    connection: Connection, tmp_path: Path
) -> None:
    """A later update's is undone by the restore; a backup of before vectors is read."""
    expert = make_expert(connection)
    worker_of(expert).push(1.0)
    serve(expert)
    backup = backed_up(connection, tmp_path / "backup")
    worker_of(expert, "bob").push(1.0)
    serve(expert)
    restore(BackupStore(connection), backup, replace=True)
    assert stored(connection) == {"alice": vector().to_json()}
    remove_expert(connection, NAME)
    assert stored(connection) == {}
    assert not connection.client.exists(connection.keys.expert(NAME).vectors)
    restore(BackupStore(connection), backup)
    assert stored(connection) == {"alice": vector().to_json()}


def test_verify_finds_a_vector_that_no_update_brought(
    connection: Connection, redis_url: str, tmp_path: Path
) -> None:
    """Changed, added and removed by hand; equal is equal."""
    spec = small_spec()
    expert = make_expert(
        connection,
        spec=spec,
        weights=initial_weights(spec.layout, spec.init_seed),
        archive=Archive(tmp_path / NAME),
    )
    for name, tells in (("alice", vector()), ("bob", vector(0.25)), ("carol", WITHHELD)):
        worker_of(expert, name, tells).push(0.5)
    assert serve(expert) == ["applied"] * 3
    key = connection.keys.expert(NAME).vectors

    def verify() -> str:
        return (
            CliRunner().invoke(cli, ["verify", "--keep-updates", str(tmp_path), "--redis", redis_url]).output
        )

    assert "replayed 3 of 3 updates, equal" in verify()
    connection.client.hset(key, "mallory", vector().to_json())
    connection.client.hset(key, "alice", vector(1.0).to_json())
    connection.client.hdel(key, "bob")
    assert "differs: other domain vectors than in Redis, of alice, bob, mallory" in verify()
