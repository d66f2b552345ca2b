"""Hazards of a Redis that lost something: a part of an expert, or everything since an older file."""

from fedmoe.store.backup import BackupStore
from fedmoe.store.connection import Connection
from tests.hazards.units import expect
from tests.hazards.world import EXPERT, AggregatorProcess, WorkerProcess, World


def _later(aggregator: AggregatorProcess, *workers: WorkerProcess) -> None:
    """Some turns of each process, with time in between."""
    for _ in range(4):
        aggregator.time_passes()
        aggregator.turn()
        for worker in workers:
            worker.turn()


def h19_decisions_are_gone(world: World) -> None:
    """Alice's update is applied, then the hash `decided` is removed; the aggregator retains nothing.

    At the end the operator puts the hash back.
    """
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    alice.push()
    a0.turn()
    alice.turn()
    decided = world.redis.hgetall(world.keys.decided)
    world.redis.delete(world.keys.decided)
    world.cut_connections()
    a0.forgets()
    alice.look()
    _later(a0, alice)
    world.expect_expert(alice=[1])
    world.redis.hset(world.keys.decided, mapping=decided)
    world.settle(a0, alice)
    world.expect_expert(alice=[1])


def h20_older_file(world: World) -> None:
    """Alice publishes two updates and ends; Redis comes back from a file between them."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    alice.push()
    a0.turn()
    alice.turn()
    older = world.snapshot()
    alice.push()
    a0.turn()
    alice.turn()
    alice.kill()
    world.fail_over(older)
    world.settle(a0)
    _later(a0)
    world.expect_expert(alice=[1, 1])


def h20_committed_meanwhile(world: World) -> None:
    """The same, and a second aggregator commits bob's update before the first one notices."""
    world.create()
    alice, bob = world.worker("alice"), world.worker("bob")
    a0, a1 = world.aggregator("A0"), world.aggregator("A1")
    older = world.snapshot()
    alice.push()
    a0.turn()
    alice.turn()
    alice.kill()
    world.fail_over(older)
    world.lease_expires()
    bob.push()
    a1.turn(3)
    bob.turn()
    world.lease_expires()
    a0.time_passes()
    _later(a0)
    world.settle(a0, bob)
    world.expect_expert(alice=[1], bob=[1])


def h20_rules_in_an_older_file(world: World) -> None:
    """An operator changes the rules, and the aggregator uses them; Redis comes back from before the change."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    a0.turn()
    older = world.snapshot()
    world.change_rules(lr=0.5)
    alice.push()
    a0.turn(3)
    alice.turn()
    world.fail_over(older)
    _later(a0, alice)
    rules = world.meta.rules
    expect(rules.number == 2, f"the operator's change is lost: rules {rules.number} are in force")
    world.settle(a0, alice)
    world.expect_expert(alice=[0.5])


def h21_restored_backup(world: World) -> None:
    """Alice's update is applied; then the operator puts the expert back as it was before."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    a0.turn()
    store = BackupStore(Connection(a0.connection.settings))
    before = store.read(EXPERT)
    alice.push()
    a0.turn()
    alice.turn()
    alice.kill()
    store.write(EXPERT, before, gateway_weight="1", replace=True)
    world.cut_connections()
    _later(a0)
    world.expect_expert(alice=[0])
    store.connection.close()


def h22_run_of_the_same_number(world: World) -> None:
    """Alice's run 1 is decided; Redis comes back from before it, alice begins another run 1; memory is written back."""
    world.create()
    a0 = world.aggregator()
    a0.turn()
    older = world.snapshot()
    alice = world.worker("alice")
    alice.push()
    a0.turn()
    alice.kill()
    world.fail_over(older)
    alice = world.worker("alice", at=1)
    alice.push()
    _later(a0, alice)
    world.settle(a0, alice)
    world.expect_expert(alice=[1, 1])
