"""Hazards of the merged gateway: a failover, two builders, and a trained gateway beside it."""

from fedmoe.protocol.keys import Keys
from fedmoe.protocol.names import GATEWAY
from tests.federation import make_expert
from tests.hazards.units import expect
from tests.hazards.world import World


def h14_built_of_another_history(world: World) -> None:
    """The builder reads version 1 = {a}; a failover to 0; it writes; bob's update makes version 1 = {b}."""
    world.create()
    alice, bob = world.worker("alice"), world.worker("bob")
    a0 = world.aggregator()
    builder, steps = world.builder("one")
    replica = world.snapshot()
    alice.push()
    a0.turn()
    steps.before(b"{merged}:weights", lambda: world.roll_back(replica))
    builder.refresh()
    alice.kill()
    bob.push()
    a0.forgets()
    a0.turn(3)
    assert world.meta.version == 1
    builder.refresh()
    world.expect_gateway()


def h14_overwritten_by_a_late_builder(world: World) -> None:
    """A paused builder overwrites the present gateway with one that it built long ago."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    (late, steps), (present, _) = world.builder("late"), world.builder("present")

    def meanwhile() -> None:
        alice.push()
        a0.turn()
        present.refresh()

    steps.before(b"{merged}:weights", meanwhile)
    late.refresh()
    present.refresh()
    world.expect_gateway()


def h14_merged_beside_the_trained(world: World) -> None:
    """The federation trains a gateway too, and the builder merges the experts."""
    world.create()
    make_expert(world.connect(), GATEWAY, spec=world.spec)
    key = Keys().expert(GATEWAY).meta
    before = world.redis.hgetall(key)
    builder, _ = world.builder("one")
    builder.refresh()
    expect(world.redis.hgetall(key) == before, "the merge overwrote the trained gateway")
    world.expect_gateway()
