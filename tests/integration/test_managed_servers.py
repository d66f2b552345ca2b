"""What managed servers refuse, FedMoE does not need: CONFIG and the rest of administration, and long requests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from consumers.gateway.builder import GatewayBuilder
from fedmoe.errors import FedMoEError
from fedmoe.protocol.layout import Layout
from fedmoe.settings import GatewaySettings, RedisSettings
from fedmoe.store.backup import BackupStore
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis, find_server
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.inspect import Inspector
from fedmoe.store.probe import check_redis
from fedmoe.tools.backup import Backup, back_up, restore
from fedmoe.util.check import FAIL
from tests.federation import ScriptedWorker, make_expert, serve, small_spec

# The union of what docs/runbook.md cites: ElastiCache, MemoryDB, Memorystore, Redis Cloud.
REFUSED = (
    "ACL", "BGREWRITEAOF", "BGSAVE", "CLIENT", "CLUSTER", "COMMAND", "CONFIG", "DEBUG", "LASTSAVE", "MIGRATE", "MODULE",
    "MONITOR", "OBJECT", "PSYNC", "REPLICAOF", "SAVE", "SHUTDOWN", "SLAVEOF", "SYNC",
)  # fmt: skip
TEN_MB = 10 * 1000 * 1000


@contextmanager
def managed(*options: str) -> Iterator[Connection]:
    """A connection to a server that refuses what managed servers refuse."""
    words = [word for name in REFUSED for word in ("--rename-command", name, "")]
    with EmbeddedRedis(server=find_server(), options=["--appendonly", "no", *words, *options]) as server:
        connection = Connection(RedisSettings(url=server.url, timeout_s=5.0))
        try:
            yield connection
        finally:
            connection.close()


def layout_of_bytes(n_bytes: int) -> Layout:
    """An adapter whose weights have so many bytes."""
    module, half = "base_model.model.layers.0.q_proj", n_bytes // 16
    return Layout.of([(f"{module}.lora_A.weight", (2, half)), (f"{module}.lora_B.weight", (half, 2))])


def train(connection: Connection, layout: Layout | None = None) -> list[str]:
    """An expert, two updates on it, and the gateway."""
    spec = small_spec(layout=layout, wire_format="int4") if layout else small_spec()
    expert = make_expert(connection, spec=spec)
    worker = ScriptedWorker(connection, spec)
    outcomes = []
    for _ in range(2):
        worker.push(1e-3)
        outcomes += serve(expert)
        worker.pull()
    GatewayBuilder(connection, GatewaySettings(), holder="a", lease_s=5.0).refresh()
    return outcomes


def test_a_federation_needs_no_administration(tmp_path: Path) -> None:
    """Train, merge, look, back up, restore, and the doctor's checks, without any of the refused commands."""
    with managed() as connection:
        assert train(connection) == ["applied", "applied"]
        assert GatewayStore(connection).load_merged() is not None
        federation = Inspector(connection).federation()
        assert federation.experts[0].meta.version == 2
        back_up(BackupStore(connection), tmp_path / "b")
        restore(BackupStore(connection), Backup(tmp_path / "b"), replace=True)
        checks, _ = check_redis(connection, stream="sql_expert", worker="alice", role="")
        assert [check for check in checks if check.level == FAIL] == []


def test_a_request_of_ten_megabytes_is_enough_for_weights_below_it() -> None:
    """The weights are the longest value: parts of updates have at most a mebibyte, later commits write in place."""
    limit = ("--proto-max-bulk-len", str(TEN_MB))
    with managed(*limit) as connection:
        assert train(connection, layout_of_bytes(TEN_MB - 100_000)) == ["applied", "applied"]


def test_longer_weights_are_one_sentence() -> None:
    """What to do about it: a smaller adapter, or a larger limit."""
    limit = ("--proto-max-bulk-len", str(TEN_MB))
    with managed(*limit) as connection, pytest.raises(FedMoEError, match="largest request") as caught:
        train(connection, layout_of_bytes(TEN_MB + 100_000))
    assert "\n" not in str(caught.value)
    assert caught.value.about == "proto-max-bulk-len"
