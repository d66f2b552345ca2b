"""The server optimizer's state: in each commit, load, backup, write-back and replay; begun anew if it is lost."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from consumers.compaction import compact
from consumers.expert import Expert
from consumers.recovery.write_back import write_back
from consumers.retention import Retention
from consumers.rollback import state_from_backup, state_from_updates
from consumers.verify import Replay, replay
from fedmoe.errors import StaleStateError
from fedmoe.protocol.layout import stamp_of, stamped
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.rules import ADAPTIVE, NESTEROV, SGD
from fedmoe.protocol.spec import Spec
from fedmoe.store.archive import SUFFIX, WEIGHTS_SUFFIX, Archive
from fedmoe.store.backup import BackupStore
from fedmoe.store.change import change_rules
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.remove import remove_expert
from fedmoe.store.rollback import VersionState, roll_back_soon
from fedmoe.tools.backup import OPTIMIZER_FILE, Backup, restore
from tests.backups import backed_up
from tests.errors import raises
from tests.federation import ScriptedWorker, aggregating, make_expert, serve, small_spec
from tests.processes import fedmoe_here
from tests.strategies import randn

pytestmark = pytest.mark.one_server

NAME = "sql_expert"
OPTIMIZERS = pytest.mark.parametrize("optimizer", [NESTEROV, ADAPTIVE])
Connect = Callable[[], Connection]


class Site(NamedTuple):
    """An expert whose applied updates are kept, and its two workers."""

    expert: Expert
    workers: tuple[ScriptedWorker, ...]
    directory: Path

    def rounds(self, number: int = 1, *, batch: bool = False) -> None:
        """Each worker publishes once a round; the updates of a batch are committed together."""
        for turn in range(number):
            for place, worker in enumerate(self.workers):
                worker.push(0.1 * randn(10 * turn + place, self.expert.spec.layout.numel))
                if not batch:
                    assert serve(self.expert) == ["applied"]
            if batch:
                assert serve(self.expert) == ["applied"] * len(self.workers)
            for worker in self.workers:
                worker.pull()

    @property
    def key(self) -> str:
        return self.expert.store.keys.server_state

    @property
    def redis(self) -> object:
        return self.expert.store.connection.client

    def stored_state(self) -> bytes | None:
        """The key, once no tail lies on top of it."""
        store = self.expert.store
        if store.connection.client.hget(store.keys.meta, "tail"):
            compact(self.expert)
        return store.connection.client.get(self.key)

    def again(self) -> Expert:
        """Another aggregator that has loaded the expert."""
        expert = Expert(
            self.expert.store, self.expert.spec, aggregator="heir", archive=Archive(self.directory / NAME)
        )
        expert.load()
        return expert

    def replayed(self) -> Replay:
        """The replay, which must be equal to what Redis holds."""
        store = GatewayStore(self.expert.store.connection)
        meta, exact, lines, _ = store.whole_history(NAME)
        done = replay(self.expert.spec, meta, lines, Archive(self.directory / NAME, read_only=True))
        assert done.problem == ""
        assert done.same_values(exact.weights, exact.server_state)
        return done

    def beginnings(self) -> list[int]:
        """The versions with which a server state began."""
        lines = self.expert.store.connection.client.xrange(self.expert.store.keys.log)
        return [int(line[b"version"]) for _, line in lines if line.get(b"new_state") == b"1"]


@pytest.fixture
def make_site(connection: Connection, tmp_path: Path) -> Callable[[str], Site]:
    def make(optimizer: str) -> Site:
        spec = small_spec(wire_format="int8")
        expert = make_expert(
            connection, spec=spec, weights=initial_weights(spec.layout, spec.init_seed),
            archive=Archive(tmp_path / "kept" / NAME), rules=aggregating(server_optimizer=optimizer),
        )  # fmt: skip
        workers = tuple(ScriptedWorker(connection, spec, name) for name in ("alice", "bob"))
        return Site(expert, workers, tmp_path / "kept")

    return make


@OPTIMIZERS
def test_state_is_stamped_like_the_weights_and_replays(
    make_site: Callable[[str], Site], optimizer: str, redis_url: str
) -> None:
    """After every commit; `fedmoe verify` compares it too."""
    site = make_site(optimizer)
    assert site.stored_state() is None
    for _ in range(3):
        site.rounds()
        state = site.stored_state()
        assert state is not None
        assert stamp_of(state) == site.expert.meta.weights_commit
        site.replayed()
    assert site.beginnings() == [1]
    command = ("verify", "--redis", redis_url, "--keep-updates", str(site.directory))
    assert fedmoe_here(*command).stdout == "sql_expert: replayed 6 of 6 updates, equal\n"
    client = site.expert.store.connection.client
    client.setrange(site.key, len(site.stored_state() or b"") - 4, b"\x00\x00\x80\x3f")
    told = fedmoe_here(*command)
    assert (told.returncode, "is damaged: its weights have digests" in told.stdout) == (1, True)


@OPTIMIZERS
def test_another_aggregator_goes_on_bit_for_bit(make_site: Callable[[str], Site], optimizer: str) -> None:
    """One that loads before every commit, with updates in batches, gives what a replay gives one by one."""
    site = make_site(optimizer)
    for _ in range(3):
        site = site._replace(expert=site.again())
        site.rounds(batch=True)
    done = site.replayed()
    assert done.held.optimizer == optimizer
    assert site.beginnings() == [1]


def test_rounds_are_as_long_as_there_are_workers(make_site: Callable[[str], Site]) -> None:
    """Alice's first update is a round of its own; from then on every second update ends one."""
    site = make_site(NESTEROV)
    site.rounds(3)
    lines = site.expert.store.connection.client.xrange(site.expert.store.keys.log)
    assert [line.get(b"ends_round") for _, line in lines] == [b"1", None, b"1", None, b"1", None]
    assert site.expert.meta.round_version == 5


def test_failed_commit_takes_the_state_back(make_site: Callable[[str], Site], connect: Connect) -> None:
    """The update is decided again on what Redis holds, so it counts once, in the state too."""
    site = make_site(NESTEROV)
    site.rounds()
    before = site.expert.held.state.flat.clone()
    site.workers[0].push(1.0)
    change_rules(ExpertStore(connect(), NAME), {"gain": 1.5})
    entries = site.expert.store.read(block_ms=1, count=9)
    with raises(StaleStateError, about="commit"):
        site.expert.process(entries)
    assert torch.equal(site.expert.held.state.flat, before)
    site.expert.load()
    assert serve(site.expert) == ["applied"]
    site.replayed()


@pytest.mark.parametrize("damage", ["missing", "other weights", "too short", "no file"])
def test_lost_state_begins_anew_and_training_goes_on(
    make_site: Callable[[str], Site], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One sentence; the weights are not affected, and a replay goes over it."""
    site = make_site(NESTEROV)
    site.rounds()
    client, state = site.expert.store.connection.client, site.stored_state() or b""
    content = {
        "other weights": stamped(state, "0" * 16),
        "too short": state[:-4],
        "no file": b"x" * len(state),
    }
    client.set(site.key, content[damage]) if damage in content else client.delete(site.key)
    with caplog.at_level(logging.WARNING):
        heir = site.again()
    said = [record.getMessage() for record in caplog.records if "server state" in record.getMessage()]
    assert len(said) == 1
    assert (
        "the server optimizer starts from zero with the next update; the weights are not affected" in said[0]
    )
    site = site._replace(expert=heir)
    site.rounds()
    assert site.beginnings() == [1, 3]
    site.replayed()


def test_rules_that_need_no_state_remove_it(make_site: Callable[[str], Site]) -> None:
    """nesterov, sgd, adaptive, nesterov again: each begins anew, and nothing is left behind."""
    site = make_site(NESTEROV)
    site.rounds()
    for optimizer, beginnings in ((SGD, [1]), (ADAPTIVE, [1, 5]), (NESTEROV, [1, 5, 7])):
        change_rules(site.expert.store, {"server_optimizer": optimizer})
        site.expert.load()
        site.rounds()
        assert site.beginnings() == beginnings
        assert (site.stored_state() is None) == (optimizer == SGD)
        assert site.expert.meta.server_state == ("" if optimizer == SGD else optimizer)
        site.replayed()


@OPTIMIZERS
def test_backup_and_restore_bring_it_back(
    make_site: Callable[[str], Site], optimizer: str, connection: Connection, tmp_path: Path
) -> None:
    """The same values under the restore's commit id; an expert without a state has no file."""
    site = make_site(optimizer)
    site.rounds()
    backup = backed_up(connection, tmp_path / "backup")
    assert (tmp_path / "backup" / NAME / OPTIMIZER_FILE).is_file()
    state = site.stored_state()
    site.rounds()
    restore(BackupStore(connection), backup, replace=True)
    restored = site.stored_state()
    assert state is not None
    assert restored is not None
    assert stamped(restored, "") == stamped(state, "")
    heir = site.again()
    assert heir.held.optimizer == optimizer
    make_expert(connection, "docs_expert")
    backed_up(connection, tmp_path / "plain", "docs_expert")
    assert not (tmp_path / "plain" / "docs_expert" / OPTIMIZER_FILE).exists()
    assert Backup(tmp_path / "plain").load("docs_expert").server_state is None


def test_unfit_state_is_left_out_of_a_backup(
    make_site: Callable[[str], Site], connection: Connection, tmp_path: Path
) -> None:
    """It would be restored beside weights that it does not belong to."""
    site = make_site(NESTEROV)
    site.rounds()
    assert site.stored_state()
    connection.client.set(site.key, b"junk")
    assert backed_up(connection, tmp_path / "backup").load(NAME).server_state is None


@OPTIMIZERS
def test_write_back_and_replay_from_there(make_site: Callable[[str], Site], optimizer: str) -> None:
    """An emptied Redis gets the retained state; the log is gone, so the replay starts from what was kept."""
    site = make_site(optimizer)
    site.rounds()
    site.expert.store.connection.client.flushall()
    assert write_back(site.expert, on="")
    heir = site.again()
    assert heir.held.optimizer == optimizer
    assert heir.held.state.same_values(bytes(site.expert.held.state.file))
    site = site._replace(expert=heir)
    site.rounds()
    done = site.replayed()
    assert (done.since, done.version, site.beginnings()) == (2, 4, [])


def test_replay_starts_from_a_kept_anchor(make_site: Callable[[str], Site]) -> None:
    """Old updates are gone; the anchor's weights and server state are there."""
    site = make_site(NESTEROV)
    site.rounds(2)
    archive = Archive(site.directory / NAME)
    Retention(archive, 1.0).tend(site.expert)
    for file in list(archive.directory.glob("*" + SUFFIX)):
        file.unlink()
    site.rounds()
    assert site.replayed().since == 4
    kept = sorted(archive.directory.glob("*" + WEIGHTS_SUFFIX), key=lambda file: file.stat().st_mtime)
    assert len(kept) == 2


@OPTIMIZERS
def test_rollback_brings_the_state_of_its_version_back(
    make_site: Callable[[str], Site], optimizer: str, connection: Connection, tmp_path: Path
) -> None:
    """From kept updates and from a backup, to a version that had none, and a replay goes over all three."""
    site = make_site(optimizer)
    site.rounds()
    state, backup = site.stored_state(), backed_up(connection, tmp_path / "backup")
    site.rounds()

    def from_updates(spec: Spec, to: int = 2) -> VersionState:
        return state_from_updates(connection, NAME, spec, to=to, directory=site.directory)

    def from_backup(spec: Spec) -> VersionState:
        return state_from_backup(connection, NAME, spec, to=2, backup=backup)

    for find in (from_updates, from_backup):
        meta = roll_back_soon(site.expert.store, find, by="operator")
        restored = site.stored_state()
        assert state is not None
        assert restored is not None
        assert (stamped(restored, ""), stamp_of(restored)) == (stamped(state, ""), meta.weights_commit)
        site = site._replace(expert=site.again())
        assert site.expert.held.optimizer == optimizer
    meta = roll_back_soon(site.expert.store, lambda spec: from_updates(spec, to=0), by="operator")
    assert (meta.server_state, site.stored_state()) == ("", None)
    site = site._replace(expert=site.again())
    for worker in site.workers:
        worker.pull()
    site.rounds()
    assert site.beginnings() == [1, 8]
    assert site.replayed().rollbacks == 3


def test_state_goes_with_its_expert(make_site: Callable[[str], Site], connection: Connection) -> None:
    """Removed for good."""
    site = make_site(NESTEROV)
    site.rounds()
    remove_expert(connection, NAME)
    assert site.stored_state() is None
