"""`fedmoe gateway follow` compares validation losses and serves no worse version: losses of workers, and its own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmoe.protocol.names import GATEWAY
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from tests.following import Follow, Gateway, followers

pytestmark = pytest.mark.one_server


@pytest.fixture
def follow(connection: Connection, tmp_path: Path) -> Iterator[Follow]:
    """Make followers of the test's federation."""
    with followers(connection, tmp_path) as make:
        yield make


def test_a_worse_version_is_never_served(
    connection: Connection, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    """By the loss that is measured, also after a restart; a smaller gain than asked for is not enough."""
    gateway = Gateway(connection)
    losses: dict[int, float] = {}

    def judge(file: bytes, config: dict[str, object]) -> float:
        return losses[hash(file)]

    def version(loss: float) -> None:
        gateway.publish()
        losses[hash(GatewayStore(connection).read(GATEWAY)[1])] = loss

    caplog.set_level("INFO")
    following = follow(judge=judge, min_gain=0.1)
    served = []
    for loss in (2.0, 2.5, 1.95, 1.9, 1.9):
        version(loss)
        following.look()
        served.append(following.directory.current.split("-")[1])
    assert served == ["v1", "v1", "v1", "v4", "v4"]
    assert "its validation loss, 2.5000, is 0.5000 above that of gateway-v1-" in caplog.text
    assert json.loads((following.directory.path(following.directory.current) / "fedmoe.json").read_text())[
        "validation_loss"
    ] == pytest.approx(1.9)
    version(1.89)
    following = follow(judge=judge)  # without --min-gain: no worse is enough
    following.look()
    assert following.directory.current.startswith("gateway-v6-")
    version(1.891)
    following.look()
    assert following.directory.current.startswith("gateway-v6-")


def test_what_the_workers_measured_decides(
    connection: Connection, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the newest loss in the log, compared on the same rows; before a new one is measured, nothing changes."""
    gateway, measured = Gateway(connection), dict[int, float]()
    history = GatewayStore.history

    def with_losses(self: GatewayStore, name: str) -> Any:
        meta, file, lines = history(self, name)
        more = [
            {"worker": "sql.alice", "val_loss": str(loss), "val_version": str(version), "val_set": "rows"}
            for version, loss in measured.items()
        ]
        return meta, file, lines + more

    monkeypatch.setattr(GatewayStore, "history", with_losses)
    following, served = follow(), []
    for version, loss in ((1, 2.0), (2, 1.5), (3, None), (4, 1.6), (5, 1.4), (6, 1.4)):
        gateway.publish()
        if loss is not None:
            measured[version] = loss
        following.look()
        served.append(following.directory.current.split("-")[1])
    assert served == ["v1", "v2", "v2", "v2", "v5", "v6"]
    assert "| 1.4000 (v6) |" in (following.directory.root / "current" / "README.md").read_text()


def test_what_was_rolled_back_is_replaced_whatever_its_loss(
    connection: Connection, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator went back to an earlier version: that is not for losses to prevent."""
    read = GatewayStore.history

    def with_losses(self: GatewayStore, name: str) -> Any:
        meta, file, _ = read(self, name)
        loss = 1.0 if meta.version == 2 else 2.0
        line = {
            "worker": "sql.alice",
            "val_loss": str(loss),
            "val_version": str(meta.version),
            "val_set": "rows",
        }
        return meta, file, [line]

    monkeypatch.setattr(GatewayStore, "history", with_losses)
    gateway, following = Gateway(connection), follow()
    gateway.publish()
    gateway.publish()
    assert following.look()
    assert following.directory.current.startswith("gateway-v2-")
    gateway.publish()
    assert following.look()
    assert following.directory.current.startswith("gateway-v2-")  # version 3 is worse
    gateway.publish()
    connection.client.hset(connection.keys.expert(GATEWAY).meta, "rolled_back", "[[1,3]]")
    assert following.look()
    assert following.directory.current.startswith("gateway-v4-")


def test_without_a_loss_min_gain_is_said_not_to_apply(
    connection: Connection, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    """Once; every version is served then."""
    gateway = Gateway(connection)
    following = follow(min_gain=0.1)
    for _ in range(3):
        gateway.publish()
        following.look()
    assert following.directory.current.startswith("gateway-v3-")
    assert caplog.text.count("--min-gain is not applied") == 1


def test_a_gateway_that_was_made_again_is_judged_by_its_losses_alone(
    connection: Connection, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its versions begin at 1 again, so their numbers say nothing about which loss is the newer one."""
    losses = {"": {1: 2.0, 2: 1.9, 3: 1.5}, "f" * 16: {1: 2.0, 2: 1.4}}
    read = GatewayStore.history

    def with_losses(self: GatewayStore, name: str) -> Any:
        meta, file, _ = read(self, name)
        known = losses.get(meta.lineage, losses[""])
        line = {"worker": "sql.alice", "val_version": str(meta.version), "val_set": "rows"}
        return meta, file, [line | {"val_loss": str(known[meta.version])}]

    monkeypatch.setattr(GatewayStore, "history", with_losses)
    gateway, following = Gateway(connection), follow()
    for _ in range(3):
        gateway.publish()
    assert following.look()
    assert following.directory.current.startswith("gateway-v3-")
    meta = connection.keys.expert(GATEWAY).meta
    for version, served in ((1, "gateway-v3-"), (2, "gateway-v2-")):
        made_again = {"lineage": "f" * 16, "version": version}
        connection.client.hset(meta, mapping=made_again)
        assert following.look()
        assert following.directory.current.startswith(served)


def test_the_same_version_with_other_options_needs_no_new_loss(
    connection: Connection, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the end of the training nobody measures again, and a server may need another rank or type."""
    read = GatewayStore.history
    line = {"worker": "sql.alice", "val_loss": "2.0", "val_version": "1", "val_set": "rows"}
    monkeypatch.setattr(GatewayStore, "history", lambda self, name: (*read(self, name)[:2], [line]))
    gateway = Gateway(connection)
    gateway.publish()
    assert follow(min_gain=0.1).look()
    for options in ("rank=8", "rank=8 dtype=bf16", ""):
        before, following = follow().directory.current, follow(options=options, min_gain=0.1)
        assert following.look()
        assert following.directory.current != before
    gateway.publish()  # another version needs a loss of its own
    following = follow(options="rank=8")
    following.look()
    assert following.directory.current.startswith("gateway-v1-")


@pytest.mark.parametrize(("loss", "is_served"), [(2.0, True), (2.1, False)])
def test_with_rows_to_measure_on_other_options_must_be_no_worse(
    connection: Connection, follow: Follow, loss: float, is_served: bool
) -> None:
    """A lower rank may lose something; but no gain is asked of what was trained no further."""
    Gateway(connection).publish()
    assert follow(judge=lambda *_: 2.0).look()
    losses = iter((loss, 2.0))  # the new one, then the served one
    following = follow(judge=lambda *_: next(losses), options="rank=8", min_gain=0.1)
    before = following.directory.current
    following.look()
    assert (following.directory.current != before) == is_served
