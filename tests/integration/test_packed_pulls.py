"""Pulls in a lossy format: what workers stand on is what they decoded, what Redis holds stays exact."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from consumers.expert import Expert
from fedmoe.protocol.codec import FORMATS, Format
from fedmoe.protocol.layout import Layout, values_of
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.packed import pack
from fedmoe.store.backup import BackupStore
from fedmoe.store.connection import Connection
from fedmoe.tools.backup import restore
from producers.pull import pull
from tests.backups import backed_up
from tests.federation import LAYOUT, ScriptedWorker, delta_of, make_expert, serve, small_spec
from tests.strategies import randn

LOSSY = sorted(FORMATS.keys() - {"fp32"})


def exact(expert: Expert) -> torch.Tensor:
    """The weights as Redis holds them."""
    return values_of(LAYOUT, expert.store.load().weights)


def begin(connection: Connection, wire_format: str) -> Expert:
    return make_expert(
        connection, spec=small_spec(wire_format=wire_format), weights=initial_weights(LAYOUT, 0)
    )


def trained(connection: Connection) -> tuple[Expert, ScriptedWorker]:
    """An int4 expert whose packed weights are not the exact ones, and a worker that has yet to pull them.

    By two updates: what was decoded once would be encoded to the same bytes again.
    """
    expert = begin(connection, "int4")
    alice, bob = (ScriptedWorker(connection, expert.spec, name) for name in ("alice", "bob"))
    alice.push(randn(1, LAYOUT.numel) * 0.01)
    bob.push(randn(2, LAYOUT.numel) * 0.01)
    serve(expert)
    bob.pull()
    assert not torch.equal(bob.ledger.base, exact(expert))
    return expert, alice


@pytest.mark.parametrize("wire_format", LOSSY)
def test_books_balance_on_blurred_weights(connection: Connection, wire_format: str) -> None:
    """Local = base + progress, with the packed weights as base and what the format rounded away as progress."""
    expert = begin(connection, wire_format)
    alice, bob = (ScriptedWorker(connection, expert.spec, name) for name in ("alice", "bob"))
    weights = exact(expert).clone()
    for round_ in range(5):
        for number, worker in enumerate((alice, bob)):
            worker.push(randn(10 * round_ + number, LAYOUT.numel) * 0.01)
        sent = [delta_of(worker.ledger.queue[0], LAYOUT.numel) for worker in (alice, bob)]
        rest = [worker.ledger.progress(worker.local).clone() for worker in (alice, bob)]
        assert serve(expert) == ["applied", "applied"]
        weights.add_(sent[0], alpha=1.0).add_(sent[1], alpha=0.5)
        assert torch.equal(exact(expert), weights)
        for worker, progress in zip((alice, bob), rest, strict=True):
            worker.pull()
            assert not torch.equal(worker.ledger.base, weights)
            assert torch.allclose(worker.ledger.base, weights, atol=0.05)
            assert torch.allclose(worker.local, worker.ledger.base + progress, atol=1e-6)
        assert torch.equal(alice.ledger.base, bob.ledger.base)


@pytest.mark.parametrize("wire_format", LOSSY)
def test_who_joins_stands_where_the_others_stand(connection: Connection, wire_format: str) -> None:
    """A pull is a function of the commit."""
    expert = begin(connection, wire_format)
    alice = ScriptedWorker(connection, expert.spec, "alice")
    assert torch.equal(alice.local, exact(expert))  # nothing was learned, so nothing is blurred
    alice.push(randn(1, LAYOUT.numel) * 0.01)
    serve(expert)
    alice.pull()
    assert torch.equal(ScriptedWorker(connection, expert.spec, "bob").local, alice.ledger.base)


@pytest.mark.parametrize("wire_format", LOSSY)
def test_new_and_restored_experts_are_pulled_packed(
    connection: Connection, tmp_path: Path, wire_format: str
) -> None:
    """Many may join at once, and all pull again after a restore: as many bytes as after any commit."""
    expert = begin(connection, wire_format)
    keys, worker = expert.store.keys, ScriptedWorker(connection, expert.spec, "alice")
    worker.push(randn(1, LAYOUT.numel) * 0.01)
    fresh = backed_up(connection, tmp_path / "fresh")
    serve(expert)
    worker.pull()
    trained = backed_up(connection, tmp_path / "trained")
    for backup, base in ((fresh, initial_weights(LAYOUT, 0)), (trained, worker.ledger.base)):
        restore(BackupStore(connection), backup, replace=True)
        connection.client.delete(keys.weights)  # nobody needs them
        snapshot = pull(worker.store, expert.spec, known="")
        assert snapshot.weights is not None
        assert torch.equal(snapshot.weights, base)
        assert snapshot.meta.weights_commit != expert.meta.weights_commit
    connection.client.flushall()
    expert = begin(connection, wire_format)
    connection.client.delete(keys.weights)
    assert torch.equal(ScriptedWorker(connection, expert.spec, "bob").local, initial_weights(LAYOUT, 0))


def test_fp32_packs_nothing(connection: Connection) -> None:
    """Workers pull the weights themselves, to the bit."""
    expert = begin(connection, "fp32")
    alice = ScriptedWorker(connection, expert.spec, "alice")
    alice.push(randn(1, LAYOUT.numel))
    serve(expert)
    alice.pull()
    assert torch.equal(alice.local, exact(expert))
    assert not connection.client.exists(expert.store.keys.packed)


def test_commit_without_new_weights_packs_nothing(connection: Connection) -> None:
    """A refusal changes no weights, and the packed ones stay those of their commit."""
    expert = begin(connection, "int4")
    alice = ScriptedWorker(connection, expert.spec, "alice")
    alice.push(0.01)
    serve(expert)
    alice.pull()
    before = connection.client.get(expert.store.keys.packed)
    alice.push(torch.full((LAYOUT.numel,), 1e6))
    assert serve(expert) == ["refused"]
    assert connection.client.get(expert.store.keys.packed) == before
    assert torch.equal(ScriptedWorker(connection, expert.spec, "bob").local, alice.ledger.base)


@pytest.mark.parametrize("garbage", [b"garbage", b"\xc0", b"fedmoe packed"])
def test_packed_weights_that_somebody_overwrote_stop_nobody(
    connection: Connection, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The exact ones serve, and it is said."""
    expert, alice = trained(connection)
    connection.client.set(expert.store.keys.packed, garbage)
    alice.pull()
    assert torch.equal(alice.ledger.base, exact(expert))
    assert "the packed weights are not what this FedMoE writes" in caplog.text


def test_packed_key_of_another_type_stops_nobody(connection: Connection) -> None:
    """The exact weights serve until the next commit writes the key."""
    expert, alice = trained(connection)
    connection.client.delete(expert.store.keys.packed)
    connection.client.rpush(expert.store.keys.packed, "x")
    alice.pull()
    assert torch.equal(alice.ledger.base, exact(expert))
    alice.push(0.01)
    assert serve(expert) == ["applied"]
    assert connection.client.type(expert.store.keys.packed) == b"string"


@pytest.mark.parametrize("wire_format", sorted(FORMATS))
def test_expert_made_anew_with_another_shape_has_no_weights_for_a_worker(
    connection: Connection, wire_format: str
) -> None:
    """Its meta names the other spec, by which the worker sees that it has to stop."""
    expert = begin(connection, wire_format)
    alice = ScriptedWorker(connection, expert.spec, "alice")
    connection.client.flushall()
    other = small_spec(layout=Layout.of([("a", (7, 9))]), wire_format=wire_format)
    anew = make_expert(connection, spec=other)
    ScriptedWorker(connection, other, "bob").push(0.1)
    serve(anew)
    snapshot = pull(alice.store, alice.spec, known=alice.ledger.meta.weights_commit)
    assert snapshot.weights is None
    assert snapshot.meta.spec == other.digest


def test_other_initial_weights_are_noticed(connection: Connection, caplog: pytest.LogCaptureFixture) -> None:
    """A torch that draws other random numbers than the aggregator's must not shift a worker's base."""
    expert, alice = trained(connection)
    key = expert.store.keys.packed
    connection.client.setrange(key, len("fedmoe packed 1 ") + 17, "another digest!!")
    alice.pull()
    assert torch.equal(alice.ledger.base, exact(expert))
    assert "other initial weights" in caplog.text


def test_packed_weights_of_another_commit_are_not_taken(connection: Connection) -> None:
    """As a restore or a writing back leaves them."""
    expert, alice = trained(connection)
    stale = pack(torch.full((LAYOUT.numel,), 9.0), expert.spec, "0" * 16)
    connection.client.set(expert.store.keys.packed, stale)
    alice.pull()
    assert torch.equal(alice.ledger.base, exact(expert))


@pytest.mark.parametrize("wire_format", sorted(FORMATS))
def test_refused_update_in_a_batch_leaves_no_trace(connection: Connection, wire_format: str) -> None:
    """Folded and then refused for its norm, between two that are applied: weights of a run without it, to the bit."""
    expert = begin(connection, wire_format)
    workers = [ScriptedWorker(connection, expert.spec, name) for name in ("a", "b", "c", "d")]
    weights = exact(expert).clone()
    deltas = [randn(n, LAYOUT.numel) for n in range(4)]
    deltas[1] *= 1e6
    for worker, delta in zip(workers, deltas, strict=True):
        worker.push(delta)
    sent = [delta_of(worker.ledger.queue[0], LAYOUT.numel) for worker in workers]
    assert serve(expert) == ["applied", "refused", "applied", "applied"]
    for staleness, number in enumerate((0, 2, 3)):
        weights.add_(sent[number] * (1 / (1 + staleness)))
    assert torch.equal(exact(expert), weights)


def test_every_update_of_a_batch_is_folded_as_it_comes(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them is held as a whole: each part is decoded before the next is asked for, and only once."""
    numel = 2 * FORMATS["fp32"].values_per_part + 1
    spec = small_spec(layout=Layout.of([("a", (numel,))]))
    expert = make_expert(connection, spec=spec, weights=torch.zeros(numel))
    for name in ("alice", "bob", "carol"):
        ScriptedWorker(connection, spec, name).push(0.001)
    told, parts, decode = [], expert.store.parts, Format.decode

    def asked(*update: Any) -> Iterator[bytes]:
        for part in parts(*update):
            told.append("asked")
            yield part

    def decoded(self: Format, *part: Any) -> torch.Tensor:
        told.append("decoded")
        return decode(self, *part)

    monkeypatch.setattr(expert.store, "parts", asked)
    monkeypatch.setattr(Format, "decode", decoded)
    assert serve(expert) == ["applied"] * 3
    assert told == ["asked", "decoded"] * 9


def test_batch_that_fails_leaves_memory_as_it_was(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second update cannot be read: memory is that of the last commit, and the batch can be done again."""
    expert = begin(connection, "int4")
    before = exact(expert).clone()
    alice, bob = (ScriptedWorker(connection, expert.spec, name) for name in ("alice", "bob"))
    alice.push(0.01)
    bob.push(0.02)
    entries = expert.store.read(block_ms=10, count=10)
    parts = expert.store.parts

    def fails_for_bob(worker: str, *rest: object) -> object:
        if worker == "bob":
            raise ConnectionResetError
        return parts(worker, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(expert.store, "parts", fails_for_bob)
        with pytest.raises(ConnectionResetError):
            expert.process(entries)
    assert torch.equal(expert.buffer.flat, before)
    assert expert.meta.version == 0
    assert not expert.decided
    assert [verdict.outcome.value for verdict in expert.process(entries)] == ["applied", "applied"]
    assert torch.equal(expert.buffer.flat, exact(expert))
    assert expert.meta.version == 2
