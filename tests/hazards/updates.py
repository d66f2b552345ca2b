"""Hazards of one update on its way: it is expired, forged, trimmed, sent twice, stale, or of another history."""

from tests.hazards.units import expect
from tests.hazards.world import WorkerProcess, World


def payload_key(world: World, worker: WorkerProcess, last: str) -> str:
    """A key of the update that the worker has in flight: of its header ("header") or of a part ("0")."""
    header = worker.sync.ledger.queue[0].header
    return f"{world.keys.root}:payload:{worker.name}:{header.run}:{header.seq}:{last}"


def h00_away_for_a_week(world: World) -> None:
    """Alice's payload expires while others publish: her update is undecidable, resent, then refused as too stale."""
    world.create(max_staleness=1)
    alice, bob = world.worker("alice"), world.worker("bob")
    a0 = world.aggregator()
    alice.push()
    for last in ("header", "0"):
        world.redis.delete(payload_key(world, alice, last))
    for _ in range(2):
        bob.push()
        a0.turn()
        bob.turn()
    assert world.entries() == 0
    world.settle(a0, alice)
    told = alice.last_decision
    expect(
        told and "too stale: 2 updates" in told.reason,
        f"alice was told: {told.reason if told else 'nothing'}",
    )
    assert alice.sync.status.refused == 1
    alice.push()
    world.settle(a0, alice)
    world.expect_expert(alice=[0, 1], bob=[1, 1])
    alice.expect_local(alice=[0, 1], bob=[1, 1])


def h00_stream_trimmed(world: World) -> None:
    """A hostile XTRIM before the entry is read, and after: it is gone without a decision."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    a0.turn()
    for read in (False, True):
        alice.push()
        if read:
            a0.read()
        world.redis.xtrim(world.keys.updates, 0)
        world.settle(a0, alice)
    world.expect_expert(alice=[1, 1])


def h08_payload_expired(world: World) -> None:
    """Header or part expire, or a part is damaged, before they are read."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    for last in ("header", "0"):
        alice.push()
        world.redis.delete(payload_key(world, alice, last))
        world.settle(a0, alice)
    alice.push()
    world.redis.append(payload_key(world, alice, "0"), b"x")
    world.settle(a0, alice)
    world.expect_expert(alice=[1, 1, 1])


def h08_rung_by_a_stranger(world: World) -> None:
    """Somebody announces alice's next update before she has written it."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    world.redis.xadd(world.keys.updates, {"worker": "alice", "run": alice.sync.ledger.run, "seq": 1})
    a0.turn()
    alice.push()
    world.settle(a0, alice)
    world.expect_expert(alice=[1])


def h08_failover_between_set_and_xadd(world: World) -> None:
    """The parts went to the old master, the entry to the new one, and it is read before alice sends again."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    a0.turn()
    replica = world.snapshot()
    alice.steps.before(b"XADD", lambda: world.roll_back(replica))
    alice.push()
    assert world.entries() == 1
    world.settle(a0, alice)
    world.expect_expert(alice=[1])


def h08_forged_base_version(world: World) -> None:
    """Alice's update is one version stale and weighs 1/2; a forged entry announces it as fresh."""
    world.create(decay="polynomial")
    alice, bob = world.worker("alice"), world.worker("bob")
    a0 = world.aggregator()
    alice.push()
    world.redis.xtrim(world.keys.updates, 0)
    bob.push()
    a0.turn()
    forged = {
        "worker": "alice",
        "run": alice.sync.ledger.run,
        "seq": 1,
        "base_version": 1,
        "format": "evil",
        "parts": 0,
    }
    world.redis.xadd(world.keys.updates, forged)
    world.settle(a0, alice)
    world.expect_expert(alice=[0.5], bob=[1])


def h10_duplicate_of_a_refusal(world: World) -> None:
    """The reply to bob's XADD is lost, so he announces twice; his update is refused, then a duplicate."""
    world.create(max_staleness=0)
    alice, bob = world.worker("alice"), world.worker("bob")
    a0 = world.aggregator()
    alice.push()
    bob.steps.lose_reply(b"XADD")
    bob.push()
    bob.turn()
    assert world.entries() == 3
    world.settle(a0, alice, bob)
    expect(bob.last_decision and bob.last_decision.how == "refused", "bob was never told of the refusal")
    expect(not world.redis.keys("*:payload:*:1:*"), "a payload stays")
    bob.expect_local(alice=[1], bob=[])
    world.expect_expert(alice=[1], bob=[])


def h11_parts_on_the_old_master(world: World) -> None:
    """The parts went to the old master, the entry to the new one; the worker leaves once it has published."""
    world.create()
    bob = world.worker("bob")
    a0 = world.aggregator()
    a0.turn()
    replica = world.snapshot()
    bob.steps.before(b"XADD", lambda: world.roll_back(replica))
    bob.push()
    for _ in range(3):
        if not bob.sync.in_redis:
            bob.turn()
    bob.kill()
    world.settle(a0)
    world.expect_expert(bob=[1])


def h11_left_before_the_decision(world: World) -> None:
    """A worker is told to end; its last update is published, and a failover drops it."""
    world.create()
    bob = world.worker("bob")
    a0 = world.aggregator()
    a0.turn()
    replica = world.snapshot()
    bob.train()
    bob.sync.finish(30.0)
    bob.turn(2)
    world.fail_over(replica)
    a0.forgets()
    for _ in range(8):
        bob.turn()
        a0.turn()
    expect(bob.sync.has_ended, "bob never ends")
    world.expect_expert(bob=[1])


def h13_base_of_the_future(world: World) -> None:
    """Alice's base is version 1; a failover to 0; her update says base_version 1 at version 0."""
    world.create(decay="polynomial")
    alice, bob = world.worker("alice"), world.worker("bob")
    a0 = world.aggregator()
    replica = world.snapshot()
    bob.push()
    a0.turn()
    alice.look()
    world.fail_over(replica)
    a0.forgets()
    alice.push()
    assert alice.sync.ledger.queue[0].header.base_version == 1
    a0.turn(2)
    world.settle(a0, alice)
    world.expect_expert(alice=[1], bob=[])


def h16_another_lineage(world: World) -> None:
    """An operator creates the expert anew while an update for the old one waits."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    a0.turn()
    alice.push()
    world.new_lineage()
    world.settle(a0, alice)
    world.expect_expert(alice=[])
    alice.push()
    world.settle(a0, alice)
    world.expect_expert(alice=[0, 1])
