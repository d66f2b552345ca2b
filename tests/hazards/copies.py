"""Hazards of the tail's parts: Redis copies them from the payloads, and the commit makes the copies permanent."""

from typing import Any
from unittest.mock import patch

import fedmoe.store.expert
from fedmoe.errors import DamagedExpertError
from fedmoe.store import change
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from tests.hazards.parts import expect_whole, what_expires_is_gone
from tests.hazards.tails import BF16, tail_of_one
from tests.hazards.units import expect
from tests.hazards.world import EXPERT, AggregatorProcess, WorkerProcess, World


def _about_to_decide(world: World) -> tuple[AggregatorProcess, WorkerProcess]:
    """An aggregator serves the expert, and alice has published her first update."""
    world.create(wire_format=BF16)
    alice, a0 = world.worker("alice"), world.aggregator()
    a0.turn()
    alice.push()
    return a0, alice


def _part(world: World, worker: WorkerProcess) -> str:
    """The key of the only part of the worker's newest update."""
    return world.keys.part(worker.name, *worker.sync.ledger.queue[-1].id, 0)


def _before_the_commit(a0: AggregatorProcess, action: Any) -> None:
    """Do `action` once an update was checked and folded, before it is committed."""
    expert = a0.server.retained
    assert expert
    commit = expert.commit

    def first(what: Any) -> None:
        expert.commit = commit
        action()
        commit(what)

    expert.commit = first


def _copies(world: World) -> set[bytes]:
    return set(world.redis.scan_iter(match=world.keys.tail_part("*", "*")))


def h28_part_overwritten_before_the_commit(world: World) -> None:
    """Alice's part was checked and folded; before the commit, she writes other bytes under its key."""
    a0, alice = _about_to_decide(world)
    last = world.redis.strlen(part := _part(world, alice)) - 1
    _before_the_commit(a0, lambda: world.redis.setrange(part, last, b"\x40"))
    a0.turn()
    expect_whole(GatewayStore(world.connect()))
    world.expect_expert(alice=[1])
    world.settle(a0, alice)


def h28_copy_expired_before_the_commit(world: World) -> None:
    """The aggregator has copied an update, and is paused until the copy has expired; then it commits."""
    a0, alice = _about_to_decide(world)
    _before_the_commit(a0, lambda: what_expires_is_gone(world))
    a0.turn(2)
    expect_whole(GatewayStore(world.connect()))
    world.settle(a0, alice)
    world.expect_expert(alice=[1])


def h28_copy_expires_after_the_commit(world: World) -> None:
    """An update is committed, and then the time passes after which its payload, and what is half done, expire."""
    a0, alice = _about_to_decide(world)
    a0.turn()
    assert _copies(world)
    what_expires_is_gone(world)
    expect_whole(GatewayStore(world.connect()))
    world.settle(a0, alice)
    world.expect_expert(alice=[1])


def h28_copy_of_no_commit(world: World) -> None:
    """Alice's part never expires, as she wrote it so. The aggregator that has copied it is killed before its commit."""
    a0, alice = _about_to_decide(world)
    world.redis.persist(_part(world, alice))
    a0.steps.kill_before(b"EXEC")
    a0.turn()
    assert _copies(world)
    a0.forgets()
    world.settle(a0, alice)
    what_expires_is_gone(world)
    expect(len(_copies(world)) <= 1, "a copy that no commit made permanent stays for ever")
    world.expect_expert(alice=[1])


def h28_two_copies_of_one_update(world: World) -> None:
    """A0 has copied alice's update, and pauses past its lease; A1 copies and commits it; A0 goes on."""
    a0, alice = _about_to_decide(world)
    a1 = world.aggregator("A1")

    def rival() -> None:
        world.lease_expires()
        a1.turn(2)
        assert world.meta.tail

    _before_the_commit(a0, rival)
    a0.turn()
    what_expires_is_gone(world)
    expect_whole(GatewayStore(world.connect()))
    world.lease_expires()
    world.settle(a0, alice)
    world.expect_expert(alice=[1])


def h28_copies_after_a_rollback(world: World) -> None:
    """An operator rolls the expert back; later its aggregator writes the weights in place of a tail."""
    a0, alice = tail_of_one(world)
    world.roll_back_to(1)
    expect(not _copies(world), "a copy that no record names stays for ever")
    alice.look()
    alice.push()
    a0.turn(2)
    alice.turn()
    assert world.meta.tail
    a0.time_passes()
    a0.turn()
    assert not world.meta.tail
    expect(not _copies(world), "a copy that no record names stays for ever")
    world.settle(a0, alice)
    world.expect_expert(alice=[1, 0, 1])


def h28_reader_beside_a_compaction(world: World) -> None:
    """Somebody exports the expert; once the records are read, the aggregator writes the weights in their place."""
    a0, alice = tail_of_one(world)

    def compaction() -> None:
        a0.time_passes()
        a0.turn()
        assert not world.meta.tail

    reader = world.connect()
    world.step(reader).before(b"MGET", compaction)
    expect_whole(GatewayStore(reader))
    world.settle(a0, alice)


def h28_operator_beside_a_compaction(world: World) -> None:
    """An operator changes a rule; once the records are read, the aggregator writes the weights in their place."""
    a0, alice = tail_of_one(world)

    def compaction() -> None:
        a0.time_passes()
        a0.turn()
        assert not world.meta.tail

    operator = ExpertStore(world.connect(), EXPERT)
    world.step(operator.connection).before(b"EXISTS", compaction)
    try:
        change.change_rules(operator, {"max_staleness": 7})
    except DamagedExpertError as error:
        expect(False, f"the operator is told: {error}")
    world.settle(a0, alice)


def h28_worker_that_writes_all_the_time(world: World) -> None:
    """Carol writes her part again and again, also between the WATCH and the EXEC of each commit."""
    a0, alice = _about_to_decide(world)
    carol = world.worker("carol")
    carol.push()
    hers = _part(world, carol)
    bytes_of_hers, real = world.redis.get(hers), fedmoe.store.expert.execute

    def execute(pipe: Any) -> Any:
        world.redis.set(hers, bytes_of_hers)
        return real(pipe)

    with patch.object(fedmoe.store.expert, "execute", execute):
        a0.turn(3)
    expect(world.meta.version == 2, "one worker keeps the updates of all from being committed")
    world.settle(a0, alice, carol)
