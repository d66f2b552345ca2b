"""Hazards of an expert that is held: a forged validation loss, updates that wait, aggregators that take turns."""

from fedmoe.protocol.validation import IN_A_ROW, Measured
from tests.hazards.units import expect
from tests.hazards.world import AggregatorProcess, WorkerProcess, World


def measure(worker: WorkerProcess, loss: float) -> None:
    """The worker measures this validation loss of the version that it has; its next update carries it."""
    ledger = worker.sync.ledger
    worker.exchange.want_base()
    worker.exchange.offer_base(ledger.meta, ledger.base)
    assert worker.exchange.take_base() is not None
    worker.exchange.publish(Measured(loss=loss, version=ledger.meta.version, rows=8, rows_set="rows"))


def measures(aggregator: AggregatorProcess, worker: WorkerProcess, loss: float) -> None:
    """The worker publishes an update with this validation loss of the version that it has, and it is decided."""
    measure(worker, loss)
    worker.push()
    aggregator.turn(2)
    worker.turn(2)


def h26_one_forged_loss(world: World) -> None:
    """Mallory claims again and again that the expert got worse; alice and bob measure what is true."""
    world.create()
    world.change_rules(on_worse="hold")
    alice, bob, mallory = world.worker("alice"), world.worker("bob"), world.worker("carol")
    a0 = world.aggregator()
    for number in range(1 + IN_A_ROW):
        measures(a0, mallory, 0.0 if number == 0 else 9.0)
        measures(a0, alice, 2.0 - 0.1 * number)
        measures(a0, bob, 3.0 - 0.1 * number)
    expect(not world.meta.rules.held, "one forged loss holds the expert")
    world.settle(a0, alice, bob, mallory)
    world.expect_expert(alice=[1] * 3, bob=[1] * 3, carol=[1] * 3)


def h26_going_back(world: World) -> None:
    """An operator goes back to version 0, whose loss is above that of the versions that are gone."""
    world.create()
    world.change_rules(on_worse="hold")
    alice, bob = world.worker("alice"), world.worker("bob")
    a0 = world.aggregator()
    for _ in range(2):
        measures(a0, alice, 1.0)
        measures(a0, bob, 1.0)
    world.roll_back_to(0)
    world.settle(a0, alice, bob)
    for number in range(2 + IN_A_ROW):
        measures(a0, alice, 2.0 - 0.01 * number)
        measures(a0, bob, 2.0 - 0.01 * number)
    expect(not world.meta.rules.held, "the expert is held for what an operator went back to")


def h26_batch_goes_on(world: World) -> None:
    """Alice and bob measure a worse loss; the update that makes them two lies in one batch with carol's."""
    world.create()
    world.change_rules(on_worse="hold")
    alice, bob, carol = world.worker("alice"), world.worker("bob"), world.worker("carol")
    a0 = world.aggregator()
    for loss in (1.0, *[2.0] * (IN_A_ROW - 1)):
        measures(a0, alice, loss)
        measures(a0, bob, loss)
    measures(a0, alice, 2.0)
    measure(bob, 2.0)
    bob.push()
    carol.push()
    a0.turn(3)
    held_at = world.meta.version
    expect(world.meta.rules.held, "two workers agree, and the expert is not held")
    expect(held_at == 2 + 2 * IN_A_ROW, "an update was applied after the one that held the expert")
    a1 = world.aggregator("A1")  # which loads the expert, and claims what A0 had read
    world.lease_expires()
    a1.turn(3)
    carol.train()
    carol.turn(3)
    expect(world.meta.version == held_at, "an update was applied while the expert was held")
    expect(world.entries() == 1, "carol's update does not wait")
    world.release()
    a1.time_passes()
    world.settle(a1, alice, bob, carol)
    carol.update_is_due()
    carol.turn(3)
    world.settle(a1, alice, bob, carol)
    world.expect_expert(alice=[1] * (1 + IN_A_ROW), bob=[1] * (1 + IN_A_ROW), carol=[1, 1])
