"""Hazards of `fedmoe expert rollback`: what was trained on the versions that an operator took back."""

from tests.hazards.commits import before_commit
from tests.hazards.units import OFFSETS, expect
from tests.hazards.world import AggregatorProcess, WorkerProcess, World


def unlearn(worker: WorkerProcess, other: str) -> None:
    """What training does with a bad step that it finds in the adapter: the gradient takes it out again."""
    worker.training.flat[OFFSETS[other]] -= float(worker.training.flat[OFFSETS[other]])


def _bad_step(world: World) -> tuple[AggregatorProcess, WorkerProcess]:
    """Alice's step 0, a bad one, becomes version 1, and bob pulls it."""
    world.create()
    alice, bob = world.worker("alice"), world.worker("bob")
    a0 = world.aggregator()
    alice.push()
    a0.turn()
    alice.turn()
    alice.kill()
    bob.look()
    bob.expect_local(alice=[1])
    return a0, bob


def h24_update_in_flight(world: World) -> None:
    """Bob unlearns alice's bad step; before his update is decided, an operator takes that step back."""
    a0, bob = _bad_step(world)
    unlearn(bob, "alice")
    bob.push()
    world.roll_back_to(0)
    world.settle(a0, bob)
    world.expect_expert(alice=[0], bob=[0])
    told = bob.last_decision
    expect(told and "rolled back to version 0" in told.reason, "bob is not told why")
    bob.push()
    world.settle(a0, bob)
    world.expect_expert(alice=[0], bob=[0, 1])
    bob.expect_local(alice=[0], bob=[0, 1])


def h24_progress(world: World) -> None:
    """Bob's update is in flight; he trains on, and unlearns alice's bad step, which an operator takes back."""
    a0, bob = _bad_step(world)
    bob.push()
    bob.train()
    unlearn(bob, "alice")
    world.roll_back_to(0)
    world.settle(a0, bob)
    bob.push()
    world.settle(a0, bob)
    world.expect_expert(alice=[0], bob=[0, 0, 1])
    bob.expect_local(alice=[0], bob=[0, 0, 1])


def h24_own_update(world: World) -> None:
    """Alice unlearns her own bad step while its update is in flight; it is applied, and taken back at once."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    alice.push()
    alice.train()
    unlearn(alice, "alice")
    a0.turn()
    world.roll_back_to(0)
    world.settle(a0, alice)
    alice.push()
    world.settle(a0, alice)
    world.expect_expert(alice=[0, 0, 1])


def h24_between_decision_and_commit(world: World) -> None:
    """An aggregator has decided bob's update, of base 0; before its commit, an operator takes alice's step back."""
    world.create()
    alice, bob = world.worker("alice"), world.worker("bob")
    a0 = world.aggregator()
    alice.push()
    a0.turn()
    bob.push()
    before_commit(a0.server.retained, lambda: world.roll_back_to(0))
    a0.turn()
    world.settle(a0, alice, bob)
    world.expect_expert(alice=[0], bob=[1])


def h24_number_used_twice(world: World) -> None:
    """Alice's step is taken back; carol publishes two updates, the second one based on the first."""
    a0, _ = _bad_step(world)
    carol = world.worker("carol")
    carol.look()
    world.roll_back_to(0)
    carol.look()
    for _ in range(2):
        carol.push()
        world.settle(a0, carol)
    world.expect_expert(alice=[0], carol=[1, 1])


def h24_older_file(world: World) -> None:
    """An operator takes alice's step back, and the aggregator loads that; Redis comes back from before."""
    a0, bob = _bad_step(world)
    older = world.snapshot()
    world.roll_back_to(0)
    a0.time_passes()
    a0.turn(3)
    world.fail_over(older)
    for _ in range(4):
        a0.time_passes()
        a0.turn()
        bob.turn()
    expect(world.meta.rolled_back.intervals, "the operator's rollback is lost")
    world.expect_expert(alice=[0])
