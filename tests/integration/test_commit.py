"""Decide and commit, against a real server: exactly once, whatever comes twice, late or not at all."""

from collections.abc import Callable

import pytest
import torch

from consumers.expert import Expert
from fedmoe.errors import DamagedExpertError, LostExpertError, StaleStateError
from fedmoe.protocol.beat import Beat
from fedmoe.protocol.identity import BaseIdentity, tokenizer_text
from fedmoe.protocol.integrity import stamp_decided
from fedmoe.protocol.layout import stamped
from fedmoe.protocol.records import PROTOCOL, Decided
from fedmoe.protocol.update import UpdateId, make_run
from fedmoe.store.connection import Connection
from fedmoe.util.template_file import template_digest
from tests.federation import (
    FINGERPRINT,
    LAYOUT,
    ScriptedWorker,
    aggregating,
    make_expert,
    serve,
    small_spec,
    start_weights,
    stored,
    waiting,
)
from tests.hazards.stepping import Killed, Stepper

Connect = Callable[[], Connection]


def test_update_becomes_part_of_the_expert(connection: Connection) -> None:
    """Weights += Δ, version 1, a log line, and nothing is left of entry and payload."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    worker.push(2.0)
    assert serve(expert) == ["applied"]
    loaded = expert.store.load()
    assert torch.equal(stored(expert), start_weights() + 2)
    assert (loaded.meta.version, loaded.meta.applied, loaded.meta.n_examples) == (1, 1, 4)
    assert loaded.decided["alice"].id == worker.ledger.queue[0].id
    assert waiting(expert) == (0, 0)
    assert not connection.client.keys("*payload*:1:*")
    ((_, line),) = connection.client.xrange(expert.store.keys.log)
    assert (line[b"worker"], line[b"version"], line[b"staleness"]) == (b"alice", b"1", b"0")


def test_a_commit_writes_of_meta_what_changed(connection: Connection) -> None:
    """All of meta is then in Redis as the aggregator has it, and a field that another release wrote is still there."""
    expert = make_expert(connection)
    redis, key = connection.client, expert.store.keys.meta
    redis.hset(key, mapping={"later": "kept", "base_model": expert.meta.base_model})
    worker = ScriptedWorker(connection, expert.spec)
    for amount in (2.0, 1e6, 3.0):
        worker.push(amount)
        serve(expert)
        worker.pull()
        found = {name.decode(): value.decode() for name, value in redis.hgetall(key).items()}
        assert found == {**expert.meta.to_hash(), "later": "kept"}
    before = expert.meta
    expert.process(())
    assert expert.meta is before
    worker.push(1.0)
    serve(expert)
    assert expert.meta.changes(before).keys() == {
        "commit", "weights_commit", "version", "decided_stamp", "applied", "n_examples", "n_tokens", "updated_at",
        "digests", "mean_staleness",
    }  # fmt: skip


def test_the_weights_of_the_last_commit_for_other_threads(connection: Connection) -> None:
    """Of the last commit that succeeded, not those of one that was overtaken."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    worker.push(2.0)
    serve(expert)
    first = expert.meta.weights_commit
    copy = expert.settled.copy(first)
    assert copy is not None
    assert torch.equal(copy.flat, start_weights() + 2)
    worker.pull()
    worker.push(3.0)
    connection.client.hset(expert.store.keys.meta, "commit", "f" * 16)
    with pytest.raises(StaleStateError):
        serve(expert)
    copy = expert.settled.copy(first)
    assert copy is not None
    assert torch.equal(copy.flat, start_weights() + 2)


def test_worker_follows(connection: Connection) -> None:
    """After pull and push of two workers all have the expert's weights."""
    expert = make_expert(connection)
    alice, bob = (ScriptedWorker(connection, expert.spec, name) for name in ("alice", "bob"))
    alice.push(1.0)
    bob.push(10.0)
    assert serve(expert) == ["applied", "applied"]
    for worker in (alice, bob):
        worker.pull()
        assert torch.equal(worker.local, stored(expert))
    # bob's update was one version stale: (1 + 1)^-1
    assert torch.equal(stored(expert), start_weights() + 1 + 10 / 2)
    assert expert.meta.mean_staleness == 0.5


def test_published_twice_counts_once(connection: Connection) -> None:
    """A lost reply of XADD: the retry's entry is a duplicate, in the same batch and in a later one."""
    expert = make_expert(connection)
    worker = ScriptedWorker(connection, expert.spec)
    update = worker.push(1.0)
    worker.publish(update)
    assert serve(expert) == ["applied", "duplicate"]
    worker.publish(update)
    assert serve(expert) == ["duplicate"]
    assert torch.equal(stored(expert), start_weights() + 1)
    assert expert.meta.version == 1
    assert waiting(expert) == (0, 0)


def test_batch_gives_the_same_bits_as_one_by_one(connection: Connection, connect: Connect) -> None:
    """The same updates folded in one commit or in many leave equal bytes, whatever the staleness."""
    spec = small_spec()
    results = []
    for name, batched in (("batched", True), ("single", False)):
        expert = make_expert(connection, name, spec)
        workers = [ScriptedWorker(connection, spec, f"w{i}", name) for i in range(5)]
        for number, worker in enumerate(workers):
            torch.manual_seed(number)
            worker.train(torch.randn(LAYOUT.numel))
            worker.make_update()
            worker.publish()
            if not batched:
                serve(expert)
        if batched:
            assert serve(expert) == ["applied"] * 5
        results.append(stamped(expert.store.load().weights, "any"))
    assert results[0] == results[1]


def test_too_stale_is_refused_and_told(connection: Connection) -> None:
    """The staleness bound, by versions and never by a clock."""
    spec = small_spec()
    expert = make_expert(connection, spec=spec, rules=aggregating(max_staleness=1))
    late = ScriptedWorker(connection, spec, "late")
    busy = ScriptedWorker(connection, spec, "busy")
    for _ in range(2):
        busy.push(1.0)
        serve(expert)
        busy.pull()
    late.push(1.0)
    assert serve(expert) == ["refused"]
    change = late.pull()
    assert change.how is not None
    assert "too stale: 2 updates" in change.how.reason
    assert torch.equal(late.local, stored(expert))


def read_all(expert: Expert, batch: int) -> list[str]:
    """Decide all that waits, so many a commit; the outcomes in order."""
    outcomes = []
    while entries := expert.store.read(block_ms=1, count=batch):
        outcomes += [verdict.outcome.value for verdict in expert.process(entries)]
    return outcomes


def test_none_of_400_workers_in_step_is_refused(connection: Connection) -> None:
    """All publish, then all is decided, then all are told: the last one was 399 updates stale."""
    expert = make_expert(connection)
    crowd = [ScriptedWorker(connection, expert.spec, f"w{number}") for number in range(400)]
    for worker in crowd:
        worker.push(1.0)
    assert read_all(expert, 64) == ["applied"] * 400
    for worker in crowd:
        change = worker.pull()
        assert change.how is not None
        assert change.how.how == "applied"
    assert expert.meta.staleness_sum == sum(range(400))


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_staleness_bound_grows_alike_in_every_batching(connection: Connection, batch: int) -> None:
    """64 workers allow 256. The first update is one too stale; its worker is the 65th, which allows the next one's.

    It counts from the moment its update is decided, within a batch too, and not from when a batch is committed.
    """
    expert = make_expert(connection, version=257)
    head = UpdateId(make_run(1, "00000001"), 1)
    others = {f"w{number}": Decided(id=head, how="applied", version=1) for number in range(64)}
    connection.client.hset(expert.store.keys.decided, mapping={w: d.to_json() for w, d in others.items()})
    connection.client.hset(expert.store.keys.meta, "decided_stamp", stamp_decided(others))
    expert.load()
    late = [ScriptedWorker(connection, expert.spec, name) for name in ("x", "y", "z")]
    for worker in late:
        worker.push(1.0, base_version=0)
    assert read_all(expert, batch) == ["refused", "applied", "applied"]
    loaded = expert.store.load()
    assert loaded.decided["x"].reason.startswith("too stale: 257 updates were applied since the version it ")
    assert "at most 256 are allowed" in loaded.decided["x"].reason
    weights = start_weights()
    for staleness in (257, 258):
        weights.add_(torch.ones(LAYOUT.numel), alpha=1 / (1 + staleness))
    assert torch.equal(stored(expert), weights)


def test_staleness_bound_that_the_operator_chose_stays(connection: Connection) -> None:
    """However many workers there are."""
    spec = small_spec()
    expert = make_expert(connection, spec=spec, rules=aggregating(max_staleness=1))
    for number in range(3):
        ScriptedWorker(connection, spec, f"w{number}").push(1.0, base_version=0)
    assert read_all(expert, 64) == ["applied", "applied", "refused"]


def test_fingerprint_is_pinned_by_the_first_worker_that_joins(connection: Connection) -> None:
    """Without the base's weights at the aggregator, the first worker's fingerprint counts, and meta says whose."""
    expert = make_expert(connection, base_fingerprint="")
    worker = ScriptedWorker(connection, expert.spec)
    worker.store.beat(Beat(base_fingerprint="abcdef", protocol=str(PROTOCOL)), ttl_s=5)
    worker.store.join()
    ScriptedWorker(connection, expert.spec, "bob").store.join()  # has no heartbeat: changes nothing
    serve(expert)
    meta = expert.store.load().meta
    assert (meta.base_fingerprint, meta.base_fingerprint_by) == ("abcdef", "worker alice")


def test_template_that_the_first_worker_brings_becomes_the_experts(connection: Connection) -> None:
    """Of a base model that has none: pinned once, whole, and a second worker's changes nothing."""
    expert = make_expert(connection)
    for name, template in (("alice", "{{ messages }}\n{# é #}"), ("bob", "{{ other }}")):
        worker = ScriptedWorker(connection, expert.spec, name)
        tokenizer = tokenizer_text({"template": template_digest(template)})
        identity = BaseIdentity(fingerprint=FINGERPRINT, tokenizer=tokenizer, chat_template=template)
        worker.store.beat(Beat(protocol=str(PROTOCOL), **identity.beat_fields()), ttl_s=5)
        worker.store.join()
    serve(expert)
    meta = expert.store.load().meta
    assert (meta.chat_template, meta.tokenizer_by) == ("{{ messages }}\n{# é #}", "worker alice")


def test_emptied_redis_is_said(connection: Connection) -> None:
    """Nothing is invented when the expert is gone."""
    expert = make_expert(connection)
    connection.client.flushdb()
    with pytest.raises(LostExpertError):
        expert.load()


def test_missing_weights_are_said_and_change_no_books(connection: Connection) -> None:
    """A weights key that somebody deleted: the pull fails, and works when it is back."""
    expert = make_expert(connection)
    worker, other = (ScriptedWorker(connection, expert.spec, name) for name in ("alice", "bob"))
    other.push(1.0)
    serve(expert)
    weights = connection.client.get(expert.store.keys.weights)
    connection.client.delete(expert.store.keys.weights)
    with pytest.raises(DamagedExpertError):
        worker.pull()
    connection.client.set(expert.store.keys.weights, weights)
    worker.pull()
    assert torch.equal(worker.local, stored(expert))


def test_expert_made_anew_with_another_spec_is_noticed(connection: Connection) -> None:
    """An aggregator that still holds the old spec loads nothing."""
    expert = make_expert(connection)
    connection.client.flushdb()
    make_expert(connection, spec=small_spec(wire_format="int4"))
    with pytest.raises(StaleStateError):
        expert.load()


def test_update_of_an_earlier_run_that_still_waited_is_no_rollback(connection: Connection) -> None:
    """A worker starts anew while its last run's update waits: both count, and nothing is said to be lost."""
    expert = make_expert(connection)
    old = ScriptedWorker(connection, expert.spec)
    old.push(1.0)
    new = ScriptedWorker(connection, expert.spec)
    assert new.ledger.run.split("-")[0] > old.ledger.run.split("-")[0]
    new.push(2.0)
    assert serve(expert) == ["applied", "undecidable"]
    change = new.pull()
    assert not change.lost
    new.publish()
    assert serve(expert) == ["applied"]
    new.pull()
    assert torch.equal(new.local, stored(expert))
    assert torch.equal(stored(expert), start_weights() + 1 + 2 / 2)


def test_half_written_payload_goes_away_by_itself(connection: Connection, connect: Connect) -> None:
    """A worker that dies before it has announced its update leaves keys for an hour; announced ones stay for a week."""
    expert = make_expert(connection)
    dying = connect()
    steps = Stepper(dying)
    worker = ScriptedWorker(dying, expert.spec)
    worker.train(1.0)
    update = worker.make_update()
    keys = [
        expert.store.keys.header("alice", update.id.run, 1),
        expert.store.keys.part("alice", update.id.run, 1, 0),
    ]
    steps.kill_before(b"XADD")
    with pytest.raises(Killed):
        worker.publish()
    assert [3000 < connection.client.ttl(key) <= 3600 for key in keys] == [True, True]
    worker.publish()
    assert [connection.client.ttl(key) > 6 * 24 * 3600 for key in keys] == [True, True]
