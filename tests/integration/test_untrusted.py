"""Decide what anybody may have written, against a real server: refused, undecidable or garbage, never folded."""

import math
import secrets
from dataclasses import replace

import pytest
import torch

from consumers.decide import COUNTED_STEPS
from fedmoe.protocol.codec import encode
from fedmoe.protocol.update import Part
from fedmoe.store.connection import Connection
from producers.ledger import Outgoing
from tests.federation import (
    LAYOUT,
    ScriptedWorker,
    make_expert,
    serve,
    start_weights,
    stored,
    waiting,
)


@pytest.mark.parametrize("damage", [b"", b"x", b"longer than announced" * 10])
def test_damaged_part_decides_nothing(connection: Connection, damage: bytes) -> None:
    """Another content than the header's digest says: undecidable, never folded."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    update = worker.push(1.0)
    connection.client.set(expert.store.keys.part("alice", update.id.run, 1, 0), damage)
    assert serve(expert) == ["undecidable"]
    assert torch.equal(stored(expert), start_weights())


def poisoned(value: float) -> tuple[bytes, ...]:
    delta = torch.zeros(LAYOUT.numel)
    delta[3] = value
    return tuple(encode(delta, "fp32"))


@pytest.mark.parametrize(
    "changes",
    [
        {"spec": "0" * 16},
        {"base_fingerprint": "f" * 16},
        {"tokenizer": "template:ff added:1a"},
        {"wire_format": "int8"},
        {"parts": (Part(10, b"0" * 32), Part(10, b"0" * 32))},
        {"parts": (Part(2**20, b"0" * 32),)},
    ],
)
def test_header_that_breaks_the_spec_is_refused(connection: Connection, changes: dict[str, object]) -> None:
    """Refused by the header alone: the worker is told why, a dead letter is kept, the weights stay."""
    expert = make_expert(connection, tokenizer="template:00 added:1a", tokenizer_by="worker zoe")
    worker = ScriptedWorker(connection, expert.spec)
    update = worker.push(1.0)
    # published whole, but with a header that says something else
    forged = replace(update, header=replace(update.header, **changes))
    connection.client.set(expert.store.keys.header("alice", update.id.run, 1), forged.header.pack())
    assert serve(expert) == ["refused"]
    change = worker.pull()
    assert change.how is not None
    assert change.how.reason  # which: test_judge_header
    ((_, letter),) = connection.client.xrange(expert.store.keys.dead)
    assert letter[b"reason"].decode() == change.how.reason
    assert torch.equal(stored(expert), start_weights())
    assert expert.meta.version == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 1e6])
def test_poison_is_refused(connection: Connection, value: float) -> None:
    """NaN, infinity and a norm above the bound never reach the weights; the worker's next update counts."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    worker.train(1.0)
    update = worker.make_update()
    parts = poisoned(value)
    bad = Outgoing(replace(update.header, parts=tuple(Part.of(p) for p in parts)), parts)
    worker.publish(bad)
    assert serve(expert) == ["refused"]
    assert torch.equal(stored(expert), start_weights())
    worker.pull()
    worker.push(1.0)
    assert serve(expert) == ["applied"]
    assert expert.meta.refused == 1


def test_forged_counts_are_clamped_and_said(connection: Connection, caplog: pytest.LogCaptureFixture) -> None:
    """2^53 rows in one update: it is applied, and neither the totals nor the log take the number over."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    worker.push(1.0, n_examples=2**53, n_tokens=2**53, steps=2**53)
    assert serve(expert) == ["applied"]
    meta = expert.store.load().meta
    most = COUNTED_STEPS * expert.meta.rules.training.batch_size
    assert (meta.n_examples, meta.n_tokens) == (most, most * expert.meta.rules.training.max_length)
    ((_, line),) = connection.client.xrange(expert.store.keys.log)
    assert (int(line[b"n_examples"]), int(line[b"claimed_examples"])) == (most, 2**53)
    assert f"worker alice claims {2**53} rows" in caplog.text
    worker.pull()
    worker.push(1.0)
    assert serve(expert) == ["applied"]
    assert expert.meta.n_examples == most + 4


@pytest.mark.parametrize(
    "fields",
    [
        {"hello": "world"},
        {"worker": "a:b", "run": "1-00000000", "seq": "1"},
        {"worker": "*", "run": "1-00000000", "seq": "1"},
        {"worker": "alice", "run": "nonsense", "seq": "1"},
        {"worker": "alice", "run": "1-00000000", "seq": "-1"},
        {"worker": "alice", "run": "1-00000000", "seq": "٣"},
        {"worker": "alice", "run": "1-00000000", "seq": "9" * 5000},
        {"worker": b"\xff\xfe", "run": b"\x00", "seq": b"\x1b[31m"},
        {"worker": "x" * 100_000},
    ],
)
def test_garbage_in_the_stream_is_a_dead_letter(connection: Connection, fields: dict[str, str]) -> None:
    """Whatever somebody XADDs, the aggregator takes it off, keeps a bounded record, and goes on."""
    expert = make_expert(connection)
    connection.client.xadd(expert.store.keys.updates, fields)
    ScriptedWorker(connection, expert.spec).push(1.0)
    assert serve(expert) == ["applied"]
    assert expert.meta.garbage == 1
    assert waiting(expert) == (0, 0)
    ((_, letter),) = connection.client.xrange(expert.store.keys.dead)
    assert sum(map(len, letter.values())) < 1000


@pytest.mark.parametrize(
    "content", [b"", b"\xc1", b"\x80", b"\x91" * 2000, secrets.token_bytes(300), b"x" * 10**6]
)
def test_garbage_header_decides_nothing(connection: Connection, content: bytes) -> None:
    """A header that is not one: dead letter (or undecidable if empty), the worker's chain is untouched."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    update = worker.push(1.0)
    connection.client.set(expert.store.keys.header("alice", update.id.run, 1), content)
    assert serve(expert) in ([], ["undecidable"])
    assert "alice" not in expert.store.load().decided
    worker.publish(update)
    assert serve(expert) == ["applied"]


def test_header_under_another_updates_key_is_garbage(connection: Connection) -> None:
    """A header copied to the key of a later seq decides nothing."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    worker.train(1.0)
    update = worker.make_update()
    keys = expert.store.keys
    connection.client.set(keys.header("alice", update.id.run, 7), update.header.pack())
    connection.client.set(keys.part("alice", update.id.run, 7, 0), update.parts[0])
    connection.client.xadd(keys.updates, {"worker": "alice", "run": update.id.run, "seq": 7})
    assert serve(expert) == []
    assert expert.meta.garbage == 1
    assert "alice" not in expert.store.load().decided


@pytest.mark.parametrize("what", ["header", "part", "heartbeat"])
def test_worker_key_of_the_wrong_type_stops_nobody(connection: Connection, what: str) -> None:
    """What a worker may write may also be a hash where a string should be: as good as missing."""
    expert = make_expert(connection)
    mallory = ScriptedWorker(connection, expert.spec, "mallory")
    update = mallory.push(1.0)
    keys = expert.store.keys
    wrong = {
        "header": keys.header("mallory", update.id.run, 1),
        "part": keys.part("mallory", update.id.run, 1, 0),
        "heartbeat": keys.worker("mallory"),
    }[what]
    connection.client.delete(wrong)
    connection.client.rpush(wrong, "x")
    mallory.store.join()
    ScriptedWorker(connection, expert.spec, "alice").push(1.0)
    assert serve(expert)[-1] == "applied"
    assert expert.meta.applied == (2 if what == "heartbeat" else 1)
