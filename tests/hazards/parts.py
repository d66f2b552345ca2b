"""Hazards of weights that are too long for one Redis string: their parts are written and read one by one."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from unittest.mock import patch

from fedmoe.errors import DamagedExpertError, StaleStateError
from fedmoe.protocol import weights_parts
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.store import rollback
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from tests.hazards.units import LAYOUT, expect
from tests.hazards.world import EXPERT, World

PART_BYTES = 160  # two parts for the 70 values
SET_PART = b"\r\nPX\r\n"  # in a SET with an expiry, as of a part


@contextmanager
def short_strings() -> Iterator[None]:
    """Weights lie in parts."""
    with patch.object(weights_parts, "WHOLE_BYTES", 0), patch.object(weights_parts, "PART_BYTES", PART_BYTES):
        yield


def h29_reader_beside_a_commit(world: World) -> None:
    """Somebody exports the expert; after the first part of its weights, an update to the second part is committed."""
    with short_strings():
        world.create()
        carol, a0 = world.worker("carol"), world.aggregator()
        carol.push()
        a0.turn()
        carol.turn()

        def commit() -> None:
            carol.push()
            a0.turn()

        reader = world.connect()
        world.step(reader).before(b":weights:", commit, nth=2)
        expect_whole(GatewayStore(reader))
        expect(world.meta.version == 2, "carol's second update was not applied")
        world.settle(a0, carol)


def h29_late_writer_of_the_same_weights(world: World) -> None:
    """A0 is about to write the weights in place of the tail; it pauses past its lease, and A1 does it; A0 goes on."""
    with short_strings():
        world.create(wire_format="bf16")
        alice, a0, a1 = world.worker("alice"), world.aggregator(), world.aggregator("A1")
        alice.push()
        a0.turn()
        alice.turn()
        assert world.meta.tail

        def rival() -> None:
            world.lease_expires()
            a1.time_passes()
            a1.turn(2)
            assert not world.meta.tail

        a0.steps.before(b":weights:", rival)
        a0.time_passes()
        a0.turn()
        what_expires_is_gone(world)
        expect_whole(GatewayStore(world.connect()))
        world.lease_expires()
        alice.push()
        world.settle(a0, alice)
        world.expect_expert(alice=[1, 1])


def h29_expired_before_the_commit(world: World) -> None:
    """The aggregator writes the parts of new weights, and is paused until they have expired; then it commits."""
    with short_strings():
        world.create()
        alice, a0 = world.worker("alice"), world.aggregator()
        a0.steps.before(b"PERSIST", lambda: what_expires_is_gone(world))
        alice.push()
        a0.turn(2)
        expect_whole(GatewayStore(world.connect()))
        world.settle(a0, alice)
        world.expect_expert(alice=[1])


def h29_part_removed(world: World) -> None:
    """Somebody removes a part of the weights; the aggregator notices within its lease, and is killed after that."""
    with short_strings():
        world.create()
        alice, a0 = world.worker("alice"), world.aggregator()
        alice.push()
        a0.turn()
        alice.turn()
        world.redis.delete(world.keys.weights_part(world.meta.parts.commit, 1))
        for _ in range(4):
            a0.now += 20.0
            a0.turn()
        expect_whole(GatewayStore(world.connect()))
        a0.forgets()
        alice.push()
        world.settle(a0, alice)
        world.expect_expert(alice=[1, 1])


def h29_rollback_beside_a_busy_aggregator(world: World) -> None:
    """An operator rolls the expert back; right before each part is written, there is another commit."""
    with short_strings(), patch.object(rollback, "PATIENCE_S", 1.0):
        world.create()
        carol, a0 = world.worker("carol"), world.aggregator()
        carol.push()
        a0.turn()
        carol.turn()
        operator = ExpertStore(world.connect(), EXPERT)
        steps = world.step(operator.connection)

        bounds = count(1000)

        def commit() -> None:
            world.change_rules(max_staleness=next(bounds))  # another operator commits
            steps.before(SET_PART, commit)

        steps.before(SET_PART, commit)
        try:
            rollback.roll_back_soon(operator, lambda spec: _version_0(world), by="operator")
        except StaleStateError as error:
            expect(False, f"the rollback gave up: {error}")
        assert next(bounds) > 1000, "no commit came between"
        steps.forget()  # the one that would come next
        what_expires_is_gone(world)
        expect_whole(GatewayStore(world.connect()))
        world.settle(a0, carol)
        world.expect_expert(carol=[0])


def _version_0(world: World) -> rollback.VersionState:
    """The state before all updates."""
    buffer = AdapterBuffer(LAYOUT)
    buffer.flat.copy_(initial_weights(LAYOUT, world.spec.init_seed))
    return rollback.VersionState(version=0, lineage=world.meta.lineage, weights=bytes(buffer.file))


def what_expires_is_gone(world: World) -> None:
    """Parts and copies that no commit has made permanent expire."""
    for pattern in (world.keys.weights_part("*", "*"), world.keys.tail_part("*", "*")):
        for key in world.redis.scan_iter(match=pattern):
            if world.redis.pttl(key) >= 0:
                world.redis.delete(key)


def expect_whole(store: GatewayStore) -> None:
    """Assert that this reader gets the expert as one commit wrote it."""
    try:
        store.read(EXPERT)
    except DamagedExpertError as error:
        expect(False, f"the expert is damaged: {error.damage}")
