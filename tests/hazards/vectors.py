"""Hazards of domain vectors: an emptied Redis, and an update that is refused."""

from fedmoe.protocol.vectors import DomainVector
from tests.hazards.units import expect
from tests.hazards.world import WorkerProcess, World

VECTOR = DomainVector(rows=1, values=bytes(16))


def _alice(world: World) -> WorkerProcess:
    alice = world.worker("alice")
    alice.sync.ledger.vector = VECTOR
    return alice


def _expect_vector(world: World) -> None:
    expect(world.redis.hexists(world.keys.vectors, "alice"), "alice's domain vector is lost")


def h27_vector_in_an_emptied_redis(world: World) -> None:
    """Alice's vector came with an update of before; Redis is emptied, and the aggregator writes the expert back."""
    world.create()
    alice, a0 = _alice(world), world.aggregator()
    alice.push()
    a0.turn()
    alice.turn()
    world.fail_over({})
    for _ in range(4):
        a0.time_passes()
        a0.turn()
    alice.push()
    world.settle(a0, alice)
    world.expect_expert(alice=[1, 1])
    _expect_vector(world)


def h27_vector_of_a_refused_update(world: World) -> None:
    """The update that brings alice's vector is too stale, and the next one is not."""
    world.create(max_staleness=0)
    alice, bob, a0 = _alice(world), world.worker("bob"), world.aggregator()
    bob.push()
    a0.turn()
    alice.push()
    a0.turn()
    alice.turn()
    expect(alice.last_decision and alice.last_decision.how == "refused", "alice's update was not refused")
    alice.push()
    world.settle(a0, alice)
    world.expect_expert(alice=[0, 1])
    _expect_vector(world)
