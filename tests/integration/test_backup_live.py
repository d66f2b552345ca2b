"""Backup and restore of a federation that runs: one moment each, and exactly-once holds across a rollback."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from consumers.aggregator import ExpertServer
from consumers.verify import replay
from fedmoe.errors import RedisUnavailableError, UnknownExpertError
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.records import Decided
from fedmoe.settings import AggregatorSettings
from fedmoe.store.archive import Archive
from fedmoe.store.backup import BackupStore, ExpertState
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.tools.backup import Backup, back_up, restore
from producers.ledger import Change
from tests.federation import LAYOUT, ScriptedWorker, first_meta, small_spec
from tests.processes import eventually

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]
NAME = "sql_expert"
SPEC = small_spec()


class Busy(threading.Thread):
    """A worker that trains and publishes all the time, with the real ledger, as `producers.sync` does."""

    def __init__(self, connection: Connection, name: str) -> None:
        super().__init__(daemon=True)
        self.worker = ScriptedWorker(connection, SPEC, name)
        self.ending = threading.Event()
        self.changes: list[Change] = []
        self.random = torch.Generator().manual_seed(len(name))

    def run(self) -> None:
        while not self.ending.is_set() or self.worker.ledger.queue:
            try:
                self._turn()
            except (RedisUnavailableError, UnknownExpertError):
                time.sleep(0.01)  # the server was emptied

    def _turn(self) -> None:
        worker, ledger = self.worker, self.worker.ledger
        if not ledger.queue:
            worker.train(torch.randn(LAYOUT.numel, generator=self.random))
            worker.make_update()
        update = ledger.queue[0]
        entry = worker.publish(update)
        while True:
            poll = worker.store.poll(entry, update.header)
            if (poll.decided.id if poll.decided else None) != ledger.head:
                self.changes.append(worker.pull())
                return
            if not poll.entry_waits:
                return  # gone without a decision: once more
            time.sleep(0.002)

    @property
    def resent(self) -> int:
        return sum(len(change.resent) for change in self.changes)

    @property
    def lost(self) -> bool:
        return any(change.lost for change in self.changes)


@contextmanager
def federation(
    connect: Connect, kept: Path, names: tuple[str, ...] = ("a", "bo", "cat")
) -> Iterator[list[Busy]]:
    """An expert at its real version 0, an aggregator that keeps updates, and busy workers."""
    buffer = AdapterBuffer(SPEC.layout)
    buffer.flat.copy_(initial_weights(SPEC.layout, SPEC.init_seed))
    ExpertStore(connect(), NAME).create(SPEC, first_meta(SPEC), buffer.file, gateway_weight=1.0)
    settings = AggregatorSettings(lease_s=1.0, block_ms=20, keep_updates=kept)
    server, stop = ExpertServer(connect(), NAME, settings, holder="one"), threading.Event()
    aggregator = threading.Thread(target=server.run, args=(stop,))
    workers = [Busy(connect(), name) for name in names]
    for thread in (aggregator, *workers):
        thread.start()
    try:
        yield workers
        for worker in workers:
            worker.ending.set()
        for worker in workers:
            worker.join(20)
            assert not worker.is_alive(), "an update was never decided"
    finally:
        for worker in workers:
            worker.ending.set()
        stop.set()
        aggregator.join()


def ids_of(log: Any) -> list[tuple[str, str, int]]:
    """Worker, run and seq of each line."""
    return [(line[b"worker"].decode(), line[b"run"].decode(), int(line[b"seq"].decode())) for _, line in log]


def check_history(state: ExpertState, kept: Path) -> list[tuple[str, str, int]]:
    """The weights are the replay of the log, byte for byte, and each worker's head is its last line; the log's ids."""
    spec, meta = state.check(NAME)
    lines = [{k.decode(): v.decode() for k, v in fields.items()} for _, fields in state.log]
    done = replay(spec, meta, lines, Archive(kept / NAME))
    assert done.problem == ""
    assert done.weights.same_values(state.weights)
    assert len(lines) == meta.version
    ids = ids_of(state.log)
    assert max(Counter(ids).values(), default=1) == 1
    heads = {worker: (run, seq) for worker, run, seq in ids}
    assert {w.decode(): tuple(Decided.from_json(text).id) for w, text in state.decided.items()} == heads
    return ids


def backed_up(connection: Connection, directory: Path, *names: str) -> Backup:
    back_up(BackupStore(connection), directory, names)
    return Backup(directory)


def test_every_backup_under_load_is_one_moment(connect: Connect, tmp_path: Path) -> None:
    """Many backups while three workers publish: each one's weights are the replay of its own log."""
    store, versions = BackupStore(connect()), []
    with federation(connect, tmp_path / "kept") as workers:
        for number in range(12):
            back_up(store, tmp_path / str(number))
            state = Backup(tmp_path / str(number)).load(NAME)
            versions.append(len(check_history(state, tmp_path / "kept")))
            time.sleep(0.03)
    assert versions == sorted(versions)
    assert len(set(versions)) > 6, versions
    total = sum(worker.worker.ledger.seq for worker in workers)
    assert len(check_history(store.read(NAME), tmp_path / "kept")) == total
    assert not any(worker.resent or worker.lost for worker in workers)


@pytest.mark.parametrize("emptied", [False, True])
def test_restored_into_a_running_federation_each_update_counts_once(
    connect: Connect, tmp_path: Path, emptied: bool
) -> None:
    """Rolled back, or emptied and restored, while all run: what workers keep is sent again, nothing counts twice."""
    connection = connect()
    store = BackupStore(connection)
    with federation(connect, tmp_path / "kept") as workers:
        eventually("some history", lambda: len(store.read(NAME).log) > 5)
        backup = backed_up(connection, tmp_path / "b")
        saved = len(backup.load(NAME).log)
        eventually("what is to be undone", lambda: len(store.read(NAME).log) > saved + 5)
        if emptied:
            connection.client.flushall()
        # An aggregator that remembers the expert writes it back to an emptied server: the backup replaces that, too.
        restore(store, backup, replace=True)
        eventually("it goes on", lambda: len(store.read(NAME).log) > saved + 20)
    ids = check_history(store.read(NAME), tmp_path / "kept")
    assert ids[:saved] == ids_of(backup.load(NAME).log)
    assert sum(worker.resent for worker in workers) > 3
    # All that was undone was still kept: none is missing either.
    assert not any(worker.lost for worker in workers)
    for worker in workers:
        seqs = [seq for name, _, seq in ids if name == worker.worker.store.worker]
        assert seqs == list(range(1, worker.worker.ledger.seq + 1))


def test_what_is_older_than_what_workers_keep_is_lost_and_said(connect: Connect, tmp_path: Path) -> None:
    """With one decided update kept: the others are gone, once each, and the worker knows."""
    connection = connect()
    store = BackupStore(connection)
    with federation(connect, tmp_path / "kept", ("a",)) as (worker,):
        worker.worker.ledger.keep_decided_s = 0.0
        backup = backed_up(connection, tmp_path / "b")
        eventually("what is to be undone", lambda: len(store.read(NAME).log) > 9)
        restore(store, backup, replace=True)
        eventually("it goes on", lambda: worker.lost)
    seqs = [seq for _, _, seq in check_history(store.read(NAME), tmp_path / "kept")]
    assert seqs == sorted(set(seqs))
    assert len(seqs) < worker.worker.ledger.seq
