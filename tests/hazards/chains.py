"""Hazards of a worker's chain of updates: rollbacks, restarts, restored checkpoints, two processes of one name."""

from tests.hazards.units import expect
from tests.hazards.world import World


def h02_decision_lost_in_a_failover(world: World) -> None:
    """Alice saw n decided; a failover undoes that; n+1 arrives first."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    replica = world.snapshot()
    alice.push()
    a0.turn()
    alice.turn()
    world.fail_over(replica)
    a0.forgets()
    alice.push()
    world.settle(a0, alice)
    world.expect_expert(alice=[1, 1])


def h02_forged_prev(world: World) -> None:
    """The same, and somebody announces n+1 with an entry that claims that n+1 has no predecessor."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    replica = world.snapshot()
    alice.push()
    a0.turn()
    alice.turn()
    world.fail_over(replica)
    a0.forgets()
    alice.push()
    run = alice.sync.ledger.run
    world.redis.xadd(world.keys.updates, {"worker": "alice", "run": run, "seq": 2, "prev": ""})
    world.settle(a0, alice)
    world.expect_expert(alice=[1, 1])


def h04_two_decisions_lost(world: World) -> None:
    """A failover undoes two decisions; alice resends both updates in order."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    replica = world.snapshot()
    for _ in range(2):
        alice.push()
        a0.turn()
        alice.turn()
    alice.train()
    world.fail_over(replica)
    a0.forgets()
    alice.look()
    alice.expect_local(alice=[1, 1, 1])
    world.settle(a0, alice)
    alice.push()
    world.settle(a0, alice)
    world.expect_expert(alice=[1, 1, 1, 1])


def h04_more_lost_than_kept(world: World) -> None:
    """A failover undoes a decision whose update is no longer kept: the loss is reported, and later updates go on."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    replica = world.snapshot()
    for _ in range(2):
        alice.push()
        a0.turn()
        alice.turn()
        alice.now += 2 * alice.sync.ledger.keep_decided_s
    world.fail_over(replica)
    a0.forgets()
    alice.push()
    world.settle(a0, alice)
    expect(any(change.lost for change in alice.exchange.changes), "the loss is not said")
    world.expect_expert(alice=[0, 1, 1])


def h05_made_anew(world: World) -> None:
    """Alice publishes n and is killed; after a restart she trains more before she resends n: which n counts?"""
    world.create()
    a0 = world.aggregator()
    alice = world.worker("alice", state=True)
    alice.push()
    a0.turn()
    alice.turn()
    alice.push()
    alice.kill()
    alice = world.worker("alice", state=True)
    alice.turn()
    a0.turn()
    alice.train(3 - alice.training.position)
    alice.push(0)
    world.settle(a0, alice)
    alice.push()
    world.settle(a0, alice)
    world.expect_expert(alice=[1, 1, 1, 1])


def h05_trained_twice(world: World) -> None:
    """Alice publishes n and is killed; n is decided; after a restart she must not train the same data again."""
    world.create()
    a0 = world.aggregator()
    alice = world.worker("alice", state=True)
    alice.push()
    a0.turn()
    alice.turn()
    alice.push()
    alice.kill()
    a0.turn()
    alice = world.worker("alice", state=True)
    alice.train(3 - alice.training.position)
    alice.update_is_due()
    alice.turn(3)
    world.settle(a0, alice)
    alice.push()
    world.settle(a0, alice)
    world.expect_expert(alice=[1, 1, 1, 1])


def h05_killed_before_a_failover(world: World) -> None:
    """Alice saw n decided, published n+1 and was killed; a failover undoes n; only her checkpoint still has it."""
    world.create()
    a0 = world.aggregator()
    replica = world.snapshot()
    alice = world.worker("alice", state=True)
    alice.push()
    a0.turn()
    alice.turn()
    alice.push()
    alice.kill()
    world.fail_over(replica)
    a0.forgets()
    alice = world.worker("alice", state=True)
    world.settle(a0, alice)
    world.expect_expert(alice=[1, 1])


def h05_old_checkpoint(world: World) -> None:
    """Alice's state directory is restored from a backup; Redis has decided an update that she does not know."""
    world.create()
    a0 = world.aggregator()
    alice = world.worker("alice", state=True)
    alice.push()
    file = alice.state_dir.file
    backup = file.read_bytes()
    for _ in range(2):
        a0.turn()
        alice.turn()
        alice.push()
    a0.turn()
    alice.turn()
    alice.kill()
    file.write_bytes(backup)
    alice = world.worker("alice", state=True)
    world.settle(a0, alice)
    alice.turn()
    alice.push()
    world.settle(a0, alice)
    world.expect_expert(alice=[1, 1, 1, 1])


def h06_same_version_of_another_history(world: World) -> None:
    """Alice's base is version 1 = {a}; a failover to 0; bob's update makes version 1 = {b}; alice pulls."""
    world.create()
    alice, bob = world.worker("alice"), world.worker("bob")
    a0 = world.aggregator()
    replica = world.snapshot()
    alice.push()
    a0.turn()
    alice.turn()
    world.fail_over(replica)
    a0.forgets()
    bob.push()
    a0.turn(2)
    alice.look()
    alice.expect_local(alice=[1], bob=[1])
    world.settle(a0, alice, bob)
    world.expect_expert(alice=[1], bob=[1])


def h06_older_version(world: World) -> None:
    """Alice's base is version 1; a failover to 0; alice pulls."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    replica = world.snapshot()
    alice.push()
    a0.turn()
    alice.turn()
    world.fail_over(replica)
    a0.forgets()
    alice.look()
    alice.expect_local(alice=[1])
    world.settle(a0, alice)
    world.expect_expert(alice=[1])


def h06_commit_between_two_reads(world: World) -> None:
    """Alice's update is decided during her pull, between any two of its requests."""
    world.create()
    a0 = world.aggregator()
    alice = world.worker("alice", state=True)
    for request in range(1, 12):
        alice.push()
        alice.kill()
        alice = world.worker(
            "alice", state=True
        )  # its first turn pulls without asking for the decision before
        alice.store.connection.ping()
        alice.steps.before(b"", a0.turn, nth=request)
        alice.turn()
        alice.steps.forget()
        alice.expect_local(alice=[1] * request)
        world.settle(a0, alice)
        alice.expect_local(alice=[1] * request)
    world.expect_expert(alice=[1] * 11)


def h06_idle_during_a_failover(world: World) -> None:
    """Alice's decided update is undone while she has nothing in flight: it must be pending again."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    replica = world.snapshot()
    alice.push()
    a0.turn()
    alice.turn()
    world.fail_over(replica)
    a0.forgets()
    alice.look()
    world.settle(a0, alice)
    world.expect_expert(alice=[1])


def h07_late_update_of_an_old_run(world: World) -> None:
    """An update of run 1 is applied, then one of run 2; then SET and XADD of the first update arrive again, late."""
    world.create()
    a0 = world.aggregator()
    old = world.worker("alice")
    old.push()
    late = old.sync.ledger.queue[0]
    a0.turn()
    old.kill()
    new = world.worker("alice", at=1)
    new.push()
    a0.turn()
    new.turn()
    old.store.publish(late.header, late.parts)
    world.settle(a0, new)
    world.expect_expert(alice=[1, 1])


def h07_two_processes_of_one_name(world: World) -> None:
    """Two processes have the name alice; each publishes its update 1; that of the first process is decided."""
    world.create()
    a0 = world.aggregator()
    one, two = world.worker("alice"), world.worker("alice", at=1)
    one.push()
    two.push()
    a0.turn()
    world.settle(a0, two)
    world.expect_expert(alice=[1, 1])


def h07_killed_without_a_state_directory(world: World) -> None:
    """Alice's update 1 waits; she is killed, restarts without state, and publishes another update 1."""
    world.create()
    a0 = world.aggregator()
    alice = world.worker("alice")
    alice.push()
    alice.kill()
    alice = world.worker("alice", at=1)
    alice.push()
    world.settle(a0, alice)
    world.expect_expert(alice=[1, 1])


def h07_seq_begins_again(world: World) -> None:
    """Alice's update 1 is decided and she leaves; after a restart her first update is update 1 again."""
    world.create()
    a0 = world.aggregator()
    for start in range(2):
        alice = world.worker("alice", at=start)
        alice.push()
        world.settle(a0, alice)
        alice.kill()
    world.expect_expert(alice=[1, 1])


def h07_the_older_twin_stops(world: World) -> None:
    """A second process of the name begins a later run; the first one must not mistake that for a rollback."""
    world.create()
    a0 = world.aggregator()
    one = world.worker("alice")
    one.push()
    a0.turn()
    one.turn()
    two = world.worker("alice", at=1)
    two.push()
    a0.turn()
    two.turn()
    one.look()
    world.settle(a0, one)
    world.expect_expert(alice=[1, 1])
    expect(one.stopped, "the first process goes on")
