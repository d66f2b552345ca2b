"""How often a worker writes a checkpoint: with each update, and else once in --checkpoint-interval."""

from pathlib import Path
from typing import Any

import pytest

from fedmoe.errors import SettingsError
from producers.checkpoint import StateDir
from producers.worker import WorkerSettings
from tests.hazards.world import World


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
    alice.sync._next_save, alice.sync._next_cut = 60.0, 600.0
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


def test_impossible_interval_is_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"checkpoint interval must be a number of at least 1 s, not 0\.5"
    ):
        WorkerSettings(stream="a", data=Path("d"), checkpoint_interval_s=0.5)
