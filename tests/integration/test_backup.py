"""`fedmoe backup` and `restore`: what comes back is what was there."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from consumers.gateway.builder import GatewayBuilder
from fedmoe.cli.main import main
from fedmoe.errors import BackupError, StaleStateError
from fedmoe.model.adapter import adapter_layout
from fedmoe.model.base import structure
from fedmoe.protocol.fit import Fit, weights_text
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.spec import Spec
from fedmoe.settings import GatewaySettings, RedisSettings
from fedmoe.store import backup as store_module
from fedmoe.store.backup import BackupStore, ExpertState
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.remove import remove_expert
from fedmoe.tools.backup import Backup, back_up, restore
from tests.backups import NAME, backed_up, content, make
from tests.errors import raises
from tests.federation import ScriptedWorker, first_meta, make_expert, serve
from tests.tiny import tiny_config, tiny_model

Connect = Callable[[], Connection]


def test_a_restore_moves_every_head_and_rebuilds_the_gateway(connection: Connection, tmp_path: Path) -> None:
    """Same lineage, new ids: an aggregator's memory commits nothing, and the gateway is built again."""
    make(connection)
    expert = make_expert(connection, "other")
    builder = GatewayBuilder(connection, GatewaySettings(), holder="a", lease_s=5.0)
    assert builder.refresh()
    assert not builder.refresh()
    backup = backed_up(connection, tmp_path / "b")
    worker = ScriptedWorker(connection, expert.spec, expert="other")
    worker.push(1.0)
    before = GatewayStore(connection).meta("other")
    restore(BackupStore(connection), backup, ["other"], replace=True)
    after = GatewayStore(connection).meta("other")
    assert (after.lineage, after.version) == (before.lineage, before.version)
    assert len({before.commit, before.weights_commit, after.commit}) == 2
    assert after.commit == after.weights_commit
    with pytest.raises(StaleStateError):
        serve(expert)
    expert.load()
    assert serve(expert) == ["applied"]  # what waited is decided on the restored state
    assert builder.refresh()


def test_everything_comes_back_byte_for_byte(connect: Connect, tmp_path: Path, redis_url: str) -> None:
    """Also what is no UTF-8, the gateway weight, unknown fields and the ids of the log; under another prefix too."""
    connection = connect()
    make(connection)
    make(connection, "b_expert", updates=0)
    redis, keys = connection.client, connection.keys.expert(NAME)
    odd = bytes(range(256))
    redis.hset(keys.meta, b"from_a_later_version\xff", odd)
    redis.xadd(keys.dead, {odd: odd, "reason": 'a "quoted"\nreason \N{SNOWMAN}'})
    redis.hset("fedmoe:experts", NAME, "0.123456789")
    before = {name: content(connection, name) for name in (NAME, "b_expert")}
    backup = backed_up(connection, tmp_path / "b")
    elsewhere = Connection(RedisSettings(url=redis_url, prefix="team"))
    restore(BackupStore(elsewhere), backup)
    assert {name: content(elsewhere, name) for name in before} == before
    elsewhere.close()
    redis.flushall()
    restore(BackupStore(connection), backup)
    assert {name: content(connection, name) for name in before} == before
    restore(BackupStore(connection), backup, replace=True)
    assert {name: content(connection, name) for name in before} == before
    # Again from what was restored: the same files but for the commit ids.
    again = backed_up(connection, tmp_path / "again")
    assert [again.load(name).log for name in before] == [backup.load(name).log for name in before]


def test_the_fit_of_the_merged_gateway_comes_back(connection: Connection, tmp_path: Path) -> None:
    """With all experts; one that is there is replaced only with --replace; a backup of some experts holds none."""
    make_expert(connection, "red")
    gateway, store = GatewayStore(connection), BackupStore(connection)
    fit = Fit(weights=weights_text({"red": (0.75,)}), loss=1.5, fitted_at=1.5)
    other = replace(fit, weights=weights_text({"red": (0.5,)}))
    gateway.write_fit(fit)
    back_up(store, tmp_path / "whole")
    back_up(store, tmp_path / "part", ["red"])
    assert Backup(tmp_path / "part").fit is None
    whole = Backup(tmp_path / "whole")
    connection.client.flushdb()
    assert restore(store, whole, ["red"]) == ""
    assert gateway.fit() is None
    connection.client.flushdb()
    assert "restored" in restore(store, whole)
    assert gateway.fit() == fit
    remove_expert(connection, "red")
    gateway.write_fit(other)
    assert "kept" in restore(store, whole)
    assert gateway.fit() == other
    assert "restored" in restore(store, whole, replace=True)
    assert gateway.fit() == fit


def test_lines_written_after_a_restore_follow_though_the_clock_is_behind(
    connection: Connection, tmp_path: Path
) -> None:
    """The log's ids are kept; on a server whose clock is a year behind, the next line still comes last."""
    make(connection)
    store = BackupStore(connection)
    state = store.read(NAME)
    late = [
        (f"{(time.time_ns() // 10**6) + 31_536_000_000 + i}-0".encode(), f)
        for i, (_, f) in enumerate(state.log)
    ]
    ahead = ExpertState(
        spec=state.spec,
        weights=state.weights,
        meta=state.meta,
        decided=state.decided,
        log=late,
        dead=state.dead,
    )
    store.write(NAME, ahead, gateway_weight="1", replace=True)
    expert = make_expert(connection)  # exists: this only loads it
    worker = ScriptedWorker(connection, expert.spec, "late")
    worker.push(1.0)
    assert serve(expert) == ["applied"]
    assert [line[b"version"] for _, line in connection.client.xrange(expert.store.keys.log)] == [
        b"1",
        b"2",
        b"3",
    ]


@pytest.mark.one_server
def test_peft_loads_each_expert_of_a_backup(connection: Connection, tmp_path: Path) -> None:
    """DIR/EXPERT is an adapter."""
    lora, config = LoraSettings(rank=4), tiny_config()
    spec = Spec(base_model="t", base_config=structure(config), layout=adapter_layout(config, lora), lora=lora)
    buffer = AdapterBuffer(spec.layout)
    buffer.flat.normal_(0, 0.1)
    ExpertStore(connection, "a").create(spec, first_meta(spec), buffer.file, gateway_weight=1.0)
    backed_up(connection, tmp_path / "b")
    model = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "b" / "a"))
    name = spec.layout.tensors[0][0]
    loaded = model.state_dict()[name.replace(".weight", ".default.weight")]
    assert torch.equal(loaded, spec.layout.views(buffer.flat)[name])


@pytest.mark.one_server
def test_the_commands_tell_what_they_did(
    connection: Connection,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A line for each expert; a second backup needs a second name; an expert that is there is not overwritten."""

    def run(*arguments: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["fedmoe", *arguments])
        monkeypatch.setenv("FEDMOE_REDIS", connection.settings.url)
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out.splitlines(), captured.err

    make(connection)
    make(connection, "a_expert", updates=1)
    capsys.readouterr()
    out = str(tmp_path / "b")
    (tmp_path / "b").mkdir()
    commits = {name: GatewayStore(connection).meta(name).commit for name in ("a_expert", NAME)}
    told = [
        f"a_expert: version 1, commit {commits['a_expert']}",
        f"{NAME}: version 2, commit {commits[NAME]}",
    ]
    assert run("backup", out) == (0, [*told, f"written to {out}"], "")
    assert sorted(os.listdir(out)) == ["a_expert", "manifest.json", NAME]
    assert os.listdir(tmp_path) == ["b"]
    code, _, error = run("backup", out)
    assert code == 1
    assert f"is not empty: give each backup a name of its own, like {out}-20" in error
    refusal = (
        f"fedmoe: {NAME} is in Redis already, at version 2 (the backup has version 2): --replace overwrites it "
        "with the backup and undoes later updates, --expert restores only other experts\n"
    )
    assert run("restore", "--expert", NAME, out) == (1, [], refusal)
    connection.client.delete("fedmoe:{a_expert}:meta")
    assert "a_expert is in Redis already, at version ?" in run("restore", out)[2]
    _, lines, _ = run("restore", "--replace", out)
    assert lines == [
        "a_expert: restored at version 1 in place of version ?",
        f"{NAME}: restored at version 2 in place of version 2",
    ]
    monkeypatch.setenv("FEDMOE_RESTORE_EXPERT", NAME)
    _, lines, _ = run("restore", "--prefix", "team", out)
    assert lines == [f"{NAME}: restored at version 2", "under the prefix 'team'; the backup is of 'fedmoe'"]
    assert connection.client.hgetall("team:experts") == {NAME.encode(): b"1"}


def test_one_expert_that_is_there_hinders_all(connection: Connection, tmp_path: Path) -> None:
    """All are checked before the first is written; --expert restores the other."""
    for name in ("a", "b"):
        make(connection, name)
    backup = backed_up(connection, tmp_path / "b")
    connection.client.delete(*connection.client.keys("fedmoe:{a}:*"), "fedmoe:experts")
    with raises(BackupError, about="replace"):
        restore(BackupStore(connection), backup)
    assert connection.client.keys("fedmoe:{a}:*") == []
    restore(BackupStore(connection), backup, ["a"])
    assert connection.client.hgetall("fedmoe:experts") == {b"a": b"1"}


def test_an_expert_that_somebody_broke_is_replaced(connection: Connection, tmp_path: Path) -> None:
    """Keys of another type, or leftovers of the wrong kind, are what a backup is for."""
    make(connection)
    before = content(connection)
    backup = backed_up(connection, tmp_path / "b")
    keys = connection.keys.expert(NAME)
    for key in (keys.meta, keys.decided, keys.log, keys.dead):
        connection.client.delete(key)
        connection.client.set(key, "oops")
    restore(BackupStore(connection), backup, replace=True)
    assert content(connection) == before


def test_somebody_else_may_create_the_expert_meanwhile(
    connection: Connection, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check and the MULTI: the other one's expert stays, and it is said."""
    make(connection)
    backup = backed_up(connection, tmp_path / "b")
    connection.client.flushall()
    other, queue = connect(), BackupStore.queue

    def create_then_queue(self: BackupStore, *rest: Any) -> None:
        make_expert(other)
        queue(self, *rest)

    monkeypatch.setattr(BackupStore, "queue", create_then_queue)
    with raises(BackupError, about="replace"):
        restore(BackupStore(connection), backup)
    assert GatewayStore(connection).meta(NAME).version == 0
    assert connection.client.xlen("fedmoe:{sql_expert}:log") == 0


def test_commits_that_come_faster_than_the_replacement(
    connection: Connection, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tries again until one gets through, and gives up with a sentence; what is there stays whole."""
    make(connection)
    backup = backed_up(connection, tmp_path / "b")
    other, queue, left = connect(), BackupStore.queue, [3]

    def commit_then_queue(self: BackupStore, *rest: Any) -> None:
        if left[0]:
            left[0] -= 1
            other.client.hset("fedmoe:{sql_expert}:meta", "commit", f"other-{left[0]}")
        queue(self, *rest)

    monkeypatch.setattr(BackupStore, "queue", commit_then_queue)
    restore(BackupStore(connection), backup, replace=True)
    assert left == [0]
    assert not GatewayStore(connection).meta(NAME).commit.startswith("other")
    monkeypatch.setattr(store_module, "ATTEMPTS", 2)
    left[0] = 5
    with raises(BackupError, about="commits"):
        restore(BackupStore(connection), backup, replace=True)
    assert GatewayStore(connection).meta(NAME).commit == "other-3"
