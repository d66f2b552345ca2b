"""How often a worker writes a checkpoint: with each update, and else once in --checkpoint-interval."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedmoe.errors import SettingsError
from fedmoe.settings import WorkerSettings
from fedmoe.store.connection import Connection
from producers.checkpoint import StateDir
from tests.counting import Counter, counting_spec, create_expert, join
from tests.errors import raises
from tests.hazards.world import World

pytestmark = pytest.mark.one_server


def test_undecided_update_is_not_written_again_and_again(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two minutes without an aggregator: the update's own checkpoint, and one a minute."""
    saved: list[float] = []
    save = StateDir.save

    def counted(self: StateDir, checkpoint: Any) -> None:
        saved.append(alice.now)
        save(self, checkpoint)

    monkeypatch.setattr(StateDir, "save", counted)
    world = World(redis_url, tmp_path)
    world.create()
    alice = world.worker("alice", state=True)
    alice.push()
    began = alice.now
    for _ in range(125):
        alice.now += 1
        alice.turn()
    world.close()
    assert [now - began for now in saved] == [0.0, 60.0, 120.0]


def test_interval_shorter_than_the_sync_interval(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates are rare: a worker that is killed between two of them goes on from a checkpoint all the same."""
    world = World(redis_url, tmp_path)
    world.create()
    alice = world.worker("alice", state=True)
    alice.sync.times.save_at, alice.sync.times.update_at = 60.0, 600.0
    alice.train(2)
    alice.now = 60.0
    alice.turn()
    alice.kill()
    alice = world.worker("alice", state=True)
    assert alice.training.position == 2
    alice.push(1)
    world.settle(world.aggregator(), alice)
    world.expect_expert(alice=[1, 1, 1])
    world.close()


def test_cut_that_comes_due_while_a_checkpoint_waits_for_the_training(
    connection: Connection, tmp_path: Path
) -> None:
    """A long step: the copy that was asked for is the checkpoint's; the update counts each step once."""
    spec = counting_spec()
    create_expert(connection, spec, sync_interval_s=100.0)
    now = 0.0
    trainer = Counter(torch.zeros(spec.layout.numel))
    member = join(connection.settings, trainer=trainer, state_dir=StateDir(tmp_path), clock=lambda: now)
    exchange, sync = member.exchange, member.sync
    for _ in range(3):
        exchange.record(trainer.step())
    now = 99.0
    sync.attempt()  # asks for a copy, which does not come in time
    now = 101.0
    exchange.boundary()
    sync.attempt()
    assert sync.ledger.queue == []
    assert exchange.steps_left == 3
    sync.attempt()
    exchange.boundary()
    sync.attempt()
    assert [update.header.steps for update in sync.ledger.queue] == [3]
    assert exchange.steps_left == 0


def test_impossible_interval_is_refused() -> None:
    with raises(SettingsError, about="checkpoint_interval"):
        WorkerSettings(stream="a", data=Path("d"), checkpoint_interval_s=0.5)
