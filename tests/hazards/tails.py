"""Hazards of snapshot and tail: the weights lie in Redis as of an earlier version, and updates on top of them."""

from fedmoe.errors import DamagedExpertError
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.store.gateway import GatewayStore
from tests.hazards.units import LAYOUT, expect
from tests.hazards.world import EXPERT, AggregatorProcess, WorkerProcess, World

BF16 = "bf16"  # exact for units, and with a tail


def tail_of_one(world: World) -> tuple[AggregatorProcess, WorkerProcess]:
    """Alice's first update is in the weights, after a quiet time; her second one is in the tail."""
    world.create(wire_format=BF16)
    alice, a0 = world.worker("alice"), world.aggregator()
    alice.push()
    a0.turn()
    alice.turn()
    a0.time_passes()
    a0.turn()
    assert not world.meta.tail
    alice.push()
    a0.turn()
    alice.turn()
    assert world.meta.tail.snapshot_version == 1
    return a0, alice


def h28_weights_of_another_moment(world: World) -> None:
    """Somebody puts back the weights of version 0 alone. The aggregator starts again; later this is corrected."""
    a0, alice = tail_of_one(world)
    right = world.redis.get(world.keys.weights)
    first = AdapterBuffer(LAYOUT)
    first.flat.copy_(initial_weights(LAYOUT, world.spec.init_seed))
    first.stamp("0" * 16)
    world.redis.set(world.keys.weights, bytes(first.file))
    _served_by_a_new_one(world, a0)
    world.redis.set(world.keys.weights, right)
    _and_on(world, a0, alice)


def h28_tail_of_another_history(world: World) -> None:
    """Bob's update comes into the tail, and somebody writes alice's last one in its place; later he corrects it."""
    a0, alice = tail_of_one(world)
    kept = world.redis.hgetall(world.keys.tail)
    alice.kill()
    bob = world.worker("bob")
    bob.push()
    a0.turn()
    bob.turn()
    right = world.redis.hgetall(world.keys.tail)
    world.redis.delete(world.keys.tail)
    world.redis.hset(world.keys.tail, mapping=kept | {b"3": kept[b"2"]})
    _served_by_a_new_one(world, a0)
    world.redis.delete(world.keys.tail)
    world.redis.hset(world.keys.tail, mapping=right)
    world.settle(a0, bob)
    world.expect_expert(alice=[1, 1], bob=[1])


def h28_value_changed_by_hand(world: World) -> None:
    """Somebody overwrites a value in the weights, and not their stamp; later he corrects it."""
    a0, alice = tail_of_one(world)
    right = world.redis.get(world.keys.weights)
    world.redis.setrange(world.keys.weights, len(right) - 4, b"\0\0\x80\x3f")
    _served_by_a_new_one(world, a0)
    world.redis.set(world.keys.weights, right)
    _and_on(world, a0, alice)


def _served_by_a_new_one(world: World, a0: AggregatorProcess) -> None:
    """An aggregator that retains nothing finds the expert, with an update waiting."""
    world.cut_connections()
    a0.forgets()
    commit = world.meta.commit
    world.worker("carol").push()
    for _ in range(3):
        a0.time_passes()
        a0.turn()
    expect(
        world.meta.commit == commit, f"{EXPERT} was committed to although its parts do not belong together"
    )


def _and_on(world: World, a0: AggregatorProcess, alice: WorkerProcess) -> None:
    alice.push()
    world.settle(a0, alice)
    world.expect_expert(alice=[1, 1, 1], carol=[1])


def h28_part_removed(world: World) -> None:
    """Somebody removes a part of the tail; the aggregator notices within its lease, and is killed after that."""
    a0, alice = tail_of_one(world)
    world.redis.delete(*world.redis.keys(world.keys.tail_part("*", "*")))
    for _ in range(4):
        a0.now += 20.0  # not long enough for a quiet time
        a0.turn()
    _expect_whole(world)
    a0.forgets()
    alice.push()
    world.settle(a0, alice)
    world.expect_expert(alice=[1, 1, 1])


def h28_rival_before_the_compaction(world: World) -> None:
    """A0 is about to compact the tail; its lease expires, and A1 commits bob's update."""
    a0, alice = tail_of_one(world)
    bob, a1 = world.worker("bob"), world.aggregator("A1")
    expert = a0.server.retained
    assert expert
    write = expert.write_weights

    def rival(*what: object) -> object:
        expert.write_weights = write
        world.lease_expires()
        bob.push()
        a1.turn(2)
        assert world.meta.version == 3
        return write(*what)

    expert.write_weights = rival
    a0.time_passes()
    a0.turn()
    _expect_whole(world)
    world.expect_expert(alice=[1, 1], bob=[1])
    world.settle(a0, alice, bob)


def h28_rolled_back(world: World) -> None:
    """An operator rolls the expert back while its tail holds two updates."""
    world.create(wire_format=BF16)
    alice, a0 = world.worker("alice"), world.aggregator()
    for _ in range(2):
        alice.push()
        a0.turn()
        alice.turn()
    world.roll_back_to(1)
    _expect_whole(world)
    alice.look()
    alice.push()
    world.settle(a0, alice)
    world.expect_expert(alice=[1, 0, 1])


def h28_rules_changed(world: World) -> None:
    """Alice's update moves the weights with momentum; then the operator changes the momentum."""
    world.create(wire_format=BF16, server_optimizer="nesterov", server_momentum=0.25)
    alice, a0 = world.worker("alice"), world.aggregator()
    alice.push()
    a0.turn()
    alice.turn()
    assert world.meta.tail
    world.change_rules(server_momentum=0.0)
    _expect_whole(world)
    world.expect_expert(alice=[1.25])
    world.settle(a0, alice)


def _expect_whole(world: World) -> None:
    """Assert that the next aggregator can load and serve the expert."""
    try:
        GatewayStore(world.connect()).read(EXPERT)
    except DamagedExpertError as error:
        expect(False, f"the expert is damaged: {error.damage}")
