"""Weights that are written in place and read in chunks: the same bytes, whatever was there before."""

import pytest
import torch

import fedmoe.store.chunks
from consumers.compaction import compact
from fedmoe.errors import (
    DamagedExpertError,
    RedisUnavailableError,
    SpecError,
    StaleStateError,
)
from fedmoe.protocol.layout import Layout, values_of
from fedmoe.store.connection import Connection
from tests.errors import raises
from tests.federation import LAYOUT, ScriptedWorker, make_expert, serve, small_spec


@pytest.fixture(autouse=True, params=[4, 20, 1024])
def _small_chunks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(fedmoe.store.chunks, "CHUNK_BYTES", request.param)
    monkeypatch.setattr(fedmoe.store.chunks, "IN_PLACE_BYTES", 1)


def calls(connection: Connection, command: str) -> int:
    """How often the server has executed a command."""
    return int(connection.client.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0))


@pytest.mark.parametrize("wire_format", ["fp32", "int4"])
def test_commits_write_in_place(connection: Connection, wire_format: str) -> None:
    expert = make_expert(connection, spec=small_spec(wire_format=wire_format))
    worker = ScriptedWorker(connection, expert.spec)
    before = calls(connection, "setrange")
    for round_ in range(3):
        worker.push(round_ + 0.5)
        assert serve(expert) == ["applied"]
        worker.pull()
        if expert.meta.tail:
            compact(expert)
    file = connection.client.get(expert.store.keys.weights)
    assert file == bytes(expert.buffer.file)
    chunks = -(-len(file) // fedmoe.store.chunks.CHUNK_BYTES)
    assert calls(connection, "setrange") - before >= 3 * (1 + chunks)  # one to try it
    if wire_format == "fp32":
        assert torch.equal(values_of(LAYOUT, file), torch.arange(float(LAYOUT.numel)) + 4.5)
        assert torch.equal(worker.ledger.base, values_of(LAYOUT, file))


def test_a_lowered_limit_stops_a_commit_before_it_writes(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SETRANGE beyond proto-max-bulk-len fails where it stands: all around it in the MULTI would be executed."""
    monkeypatch.setattr(fedmoe.store.chunks, "CHUNK_BYTES", 512 * 1024)
    redis, before = connection.client, "proto-max-bulk-len"
    spec = small_spec(layout=Layout.of([("base_model.model.layers.0.q_proj.lora_A.weight", (2, 400_000))]))
    expert = make_expert(connection, spec=spec, weights=torch.zeros(spec.layout.numel))
    ScriptedWorker(connection, spec).push(1e-3)
    whole, limit = redis.get(expert.store.keys.weights), redis.config_get(before)[before]
    redis.config_set(before, 1024 * 1024)
    try:
        with pytest.raises((RedisUnavailableError, StaleStateError)):
            serve(expert)
        assert redis.get(expert.store.keys.weights) == whole
        assert redis.hget(expert.store.keys.meta, "version") == b"0"
    finally:
        redis.config_set(before, limit)
    expert.load()
    assert expert.process(expert.store.reclaim())
    assert redis.get(expert.store.keys.weights) == bytes(expert.buffer.file) != whole


def test_an_expiry_goes_with_the_next_commit(connection: Connection) -> None:
    expert = make_expert(connection)
    ScriptedWorker(connection, expert.spec).push(1.0)
    connection.client.expire(expert.store.keys.weights, 100)
    assert serve(expert) == ["applied"]
    assert connection.client.ttl(expert.store.keys.weights) == -1


@pytest.mark.parametrize("there", [b"", b"short", b"x" * 5000, None])
def test_whatever_is_there_is_written_over_whole(connection: Connection, there: bytes | None) -> None:
    """Somebody overwrote the weights, or took them away: a commit puts them right, as it always did."""
    expert = make_expert(connection)
    key = expert.store.keys.weights
    ScriptedWorker(connection, expert.spec).push(1.0)
    connection.client.delete(key)
    if there is None:
        connection.client.rpush(key, "a list")
    elif there:
        connection.client.set(key, there)
    assert serve(expert) == ["applied"]
    assert connection.client.get(key) == bytes(expert.buffer.file)


def test_other_weights_are_not_taken(connection: Connection) -> None:
    """Too long, too short, of another layout, of another type: one sentence each; none at all: the expert is lost."""
    expert = make_expert(connection)
    worker, key = ScriptedWorker(connection, expert.spec), expert.store.keys.weights
    good = connection.client.get(key)
    for bad in (good + b"x", good[:-1], b"x" + good[1:], b"oops"):
        connection.client.set(key, bad)
        with raises(SpecError, about="weights"):
            worker.store.pull(expert.spec, known="")
    connection.client.delete(key)
    with pytest.raises(DamagedExpertError):
        worker.store.pull(expert.spec, known="")
    connection.client.rpush(key, "a list")
    with raises(RedisUnavailableError, about="key"):
        worker.store.pull(expert.spec, known="")
