"""Hazards of weights that are too long for one Redis string: their parts are written and read one by one."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from fedmoe.errors import DamagedExpertError
from fedmoe.protocol import weights_parts
from fedmoe.store.gateway import GatewayStore
from tests.hazards.units import expect
from tests.hazards.world import EXPERT, World

PART_BYTES = 160  # two parts for the 70 values


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
        _expect_whole(GatewayStore(reader))
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
        _what_expires_is_gone(world)
        _expect_whole(GatewayStore(world.connect()))
        world.lease_expires()
        alice.push()
        world.settle(a0, alice)
        world.expect_expert(alice=[1, 1])


def h29_expired_before_the_commit(world: World) -> None:
    """The aggregator writes the parts of new weights, and is paused until they have expired; then it commits."""
    with short_strings():
        world.create()
        alice, a0 = world.worker("alice"), world.aggregator()
        a0.steps.before(b"PERSIST", lambda: _what_expires_is_gone(world))
        alice.push()
        a0.turn(2)
        _expect_whole(GatewayStore(world.connect()))
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
        _expect_whole(GatewayStore(world.connect()))
        a0.forgets()
        alice.push()
        world.settle(a0, alice)
        world.expect_expert(alice=[1, 1])


def _what_expires_is_gone(world: World) -> None:
    """Parts that no commit has made permanent expire."""
    for key in world.redis.scan_iter(match=world.keys.weights_part("*", "*")):
        if world.redis.pttl(key) >= 0:
            world.redis.delete(key)


def _expect_whole(store: GatewayStore) -> None:
    """Assert that this reader gets the expert as one commit wrote it."""
    try:
        store.read(EXPERT)
    except DamagedExpertError as error:
        expect(False, f"the expert is damaged: {error.damage}")
