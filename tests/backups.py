"""An expert with a history, what Redis keeps of it, and a backup of it."""

from pathlib import Path
from typing import Any

from fedmoe.protocol.layout import stamped
from fedmoe.store.backup import BackupStore
from fedmoe.store.connection import Connection
from fedmoe.tools.backup import Backup, back_up
from tests.federation import ScriptedWorker, make_expert, serve

NAME = "sql_expert"


def make(connection: Connection, name: str = NAME, updates: int = 2) -> None:
    """An expert with applied and refused updates."""
    expert = make_expert(connection, name)
    worker = ScriptedWorker(connection, expert.spec, expert=name)
    for _ in range(updates):
        worker.push(1.0)
        serve(expert)
        worker.pull()
    worker.push(1e6)
    assert serve(expert) == ["refused"]


def content(connection: Connection, name: str = NAME) -> dict[str, Any]:
    """All that Redis keeps of an expert but its commit ids, as other commands than the store's see it."""
    redis, keys = connection.client, connection.keys.expert(name)
    meta = redis.hgetall(keys.meta)
    for name_of_id in (b"commit", b"weights_commit", b"restored"):
        meta.pop(name_of_id, None)
    weights = redis.get(keys.weights)
    return {
        "spec": redis.get(keys.spec), "weights": weights and stamped(weights, ""), "meta": meta,
        "decided": redis.hgetall(keys.decided), "log": redis.xrange(keys.log), "dead": redis.xrange(keys.dead),
        "weight": redis.hget(connection.keys.experts, name),
    }  # fmt: skip


def backed_up(connection: Connection, directory: Path, *names: str) -> Backup:
    back_up(BackupStore(connection), directory, names)
    return Backup(directory)
