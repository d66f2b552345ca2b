"""`fedmoe backup` and `restore`: whatever goes wrong is one sentence, and leaves nothing half done."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmoe.errors import (
    BackupError,
    FedMoEError,
    RedisUnavailableError,
    RedisUnfitError,
    UnknownExpertError,
)
from fedmoe.settings import RedisSettings
from fedmoe.store.backup import BackupStore, ExpertState
from fedmoe.store.connection import Connection
from fedmoe.tools.backup import Backup, back_up, restore
from tests.backups import NAME, backed_up, content, make
from tests.errors import raises
from tests.federation import small_spec
from tests.processes import environment, eventually

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "expert.json"])
@pytest.mark.parametrize("how", ["bit", "gone", "cut"])
def test_damage_is_one_sentence_and_nothing_is_written(
    connection: Connection, tmp_path: Path, file: str, how: str
) -> None:
    """Any file of the second expert: the first is not restored either."""
    make(connection, "a")
    make(connection, "b")
    backed_up(connection, tmp_path / "b")
    path = tmp_path / "b" / "b" / file
    raw = path.read_bytes()
    path.unlink()
    if how == "bit":
        path.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    elif how == "cut":
        path.write_bytes(raw[:-1])
    connection.client.flushall()
    with raises(BackupError, about=file, cause=FileNotFoundError if how == "gone" else None) as caught:
        restore(BackupStore(connection), Backup(tmp_path / "b"))
    assert "\n" not in str(caught.value)
    assert connection.client.keys() == []


@pytest.mark.parametrize(
    ("change", "about"),
    [
        ({"format": 3}, "format"),
        ({"format": 1}, "format"),
        ({"format": None}, "manifest.json"),
        ({"experts": {}}, "experts"),
        ({"experts": []}, "manifest.json"),
        ({"experts": {"../b/sql_expert": NAME}}, "manifest.json"),
        ({"experts": {NAME: {"version": 1}}}, "manifest.json"),
        ({NAME: {"version": 3}}, "experts"),
        ({NAME: {"gateway_weight": "nan"}}, "manifest.json"),
        (
            {NAME: {"files": ["adapter_model.safetensors", "adapter_config.json", "expert.json"]}},
            "manifest.json",
        ),
    ],
)
def test_a_manifest_that_is_none_is_one_sentence(
    connection: Connection, tmp_path: Path, change: dict[str, Any], about: str
) -> None:
    """A newer format, a hand that edited it, names that would lead out of the directory."""
    make(connection)
    backed_up(connection, tmp_path / "b")
    connection.client.flushall()
    path = tmp_path / "b" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["experts"][NAME] |= change.get(NAME, {})
    if change.get("experts") == {"../b/sql_expert": NAME}:
        change = {"experts": {"../b/sql_expert": manifest["experts"][NAME]}}
    path.write_text(json.dumps(manifest | {k: v for k, v in change.items() if k != NAME}))
    with raises(BackupError, about=about):
        restore(BackupStore(connection), Backup(tmp_path / "b"))
    assert connection.client.keys() == []


def test_what_is_no_backup_is_one_sentence(connection: Connection, tmp_path: Path) -> None:
    """No directory, no manifest, no JSON, an expert it does not hold."""
    with raises(BackupError, about="directory"):
        Backup(tmp_path / "none")
    with raises(BackupError, about="backup"):
        Backup(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff{")
    with raises(BackupError, about="manifest.json", cause=ValueError):
        Backup(tmp_path)
    make(connection)
    backup = backed_up(connection, tmp_path / "b")
    with raises(UnknownExpertError, about="x"):
        restore(BackupStore(connection), backup, ["x"])


@pytest.mark.parametrize(
    ("key", "value", "about"),
    [
        ("spec", "{}", "spec"),
        (
            "spec",
            None,
            "damage",
        ),
        ("weights", "short", "weights"),
        ("weights", "", "sql_expert"),
    ],
)
def test_what_cannot_be_restored_is_not_backed_up(
    connection: Connection, tmp_path: Path, key: str, value: str | None, about: str
) -> None:
    """A backup that nothing can be made of would be found out too late; --expert saves the others."""
    make(connection)
    make(connection, "a")
    value = small_spec(wire_format="int8").to_json() if value is None else value
    connection.client.set(f"fedmoe:{{sql_expert}}:{key}", value)
    with raises(FedMoEError, about=about):
        backed_up(connection, tmp_path / "b")
    assert os.listdir(tmp_path) == []
    assert list(backed_up(connection, tmp_path / "b", "a").experts) == ["a"]


def test_a_backup_of_a_spec_that_does_not_fit_is_refused(connection: Connection, tmp_path: Path) -> None:
    """Also with good digests: what meta names is not what the spec is."""
    make(connection)
    store = BackupStore(connection)
    meta = store.read(NAME).meta
    connection.client.hset("fedmoe:{sql_expert}:meta", "spec", "0" * 16)
    state = store.read(NAME)
    with raises(BackupError, about="damage"):
        state.check(NAME)
    connection.client.hset("fedmoe:{sql_expert}:meta", "spec", meta[b"spec"])
    for ids in ([b"2-0", b"1-0"], [b"0-0"], [b"1-1", b"1-1"], [b"18446744073709551616-0"], [b"1"]):
        bad = ExpertState(
            spec=state.spec,
            weights=state.weights,
            meta=meta,
            decided=state.decided,
            log=[(i, {b"a": b"b"}) for i in ids],
            dead=[],
        )
        with raises(BackupError, about="log"):
            bad.check(NAME)


def test_nothing_to_back_up_is_one_sentence(connection: Connection, tmp_path: Path) -> None:
    """No experts, an unknown one, a weight that is no number, a name that would lead out of the directory."""
    with raises(BackupError, about="experts"):
        backed_up(connection, tmp_path / "b")
    make(connection)
    with raises(UnknownExpertError, about="x"):
        backed_up(connection, tmp_path / "b", "x")
    connection.client.hset("fedmoe:experts", NAME, "much")
    with raises(BackupError, about="gateway_weight"):
        backed_up(connection, tmp_path / "b")
    connection.client.hset("fedmoe:experts", "../../x", "1")
    with raises(FedMoEError, about="expert"):
        backed_up(connection, tmp_path / "b")
    (tmp_path / "file").write_text("")
    with raises(BackupError, about="file"):
        backed_up(connection, tmp_path / "file")
    connection.client.delete("fedmoe:experts")
    connection.client.hset("fedmoe:experts", NAME, "1")
    with raises(BackupError, about="disk"):
        backed_up(connection, tmp_path / "file" / "b")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("failure", "raised", "sentence"),
    [
        (OSError(errno.ENOSPC, "x"), BackupError, "no space left for the backup"),
        (OSError(errno.EROFS, "Read-only file system"), BackupError, "Read-only file system.*choose"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
@pytest.mark.parametrize("at", [2, 5, 9])
def test_a_backup_that_fails_leaves_nothing(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int,
    failure: BaseException, raised: type[BaseException], sentence: str | None,
) -> None:  # fmt: skip
    """A full disk, a read-only one, Ctrl-C: in the first expert, in the second, at the manifest; then it works."""
    make(connection, "a")
    make(connection, "b")
    sync, calls = os.fsync, []

    def fail(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == at:
            raise failure
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(raised, match=sentence):
        backed_up(connection, tmp_path / "b")
    assert os.listdir(tmp_path) == []
    assert sorted(backed_up(connection, tmp_path / "b").experts) == ["a", "b"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_half_backup(tmp_path: Path, number: int) -> None:
    """A real process that is told to stop in the middle of an expert: exit code 130, nothing left."""
    code = (
        "import time, fedmoe.store.backup as b, fedmoe.cli.main as m; b.BackupStore.experts = lambda self: {'a': '1'}; "
        "b.BackupStore.read = lambda self, name: time.sleep(60); m.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "backup", str(tmp_path / "b")], env=environment(), stderr=subprocess.PIPE
    )
    try:
        eventually("the staging directory", lambda: os.listdir(tmp_path))
        process.send_signal(number)
        _, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, stderr.strip()) == (130, b"fedmoe: interrupted")
    assert os.listdir(tmp_path) == []


def test_redis_away_is_one_sentence(connection: Connection, tmp_path: Path) -> None:
    """For both commands, though an absent Redis is an OSError as a full disk is; no directory is left."""
    make(connection)
    backup = backed_up(connection, tmp_path / "b")
    away = BackupStore(Connection(RedisSettings(url="unix:///nowhere.sock")))
    for command in (lambda: back_up(away, tmp_path / "c"), lambda: restore(away, backup)):
        with raises(RedisUnavailableError, about="connection"):
            command()
    assert os.listdir(tmp_path) == ["b"]


BACKUP_USER = ("+multi", "+exec", "+get", "+hgetall", "+xrange")
RESTORE_USER = ("+multi", "+exec", "+watch", "+exists", "+hget", "+unlink", "+set", "+hset", "+xadd", "+scan")


def test_the_rights_that_are_documented_are_enough_and_needed(connection: Connection, tmp_path: Path) -> None:
    """With each of them taken away, one sentence; nothing is left on disk, and Redis stays as it was.

    Also without MULTI, where redis-py sends the rest of a transaction nevertheless, command by command.
    """
    make(connection)
    before = content(connection)
    admin = connection.client

    def user(*rights: str) -> BackupStore:
        basis = ("reset", "on", ">pw", "+auth", "+hello", "+unwatch")
        admin.execute_command("ACL", "SETUSER", "keeper", *basis, *rights)
        url = connection.settings.url.replace("unix://", "unix://keeper:pw@")
        return BackupStore(Connection(RedisSettings(url=url)))

    def all_but(rights: tuple[str, ...], missing: str) -> tuple[str, ...]:
        return tuple(right for right in rights if right != missing)

    try:
        for right in BACKUP_USER:
            with raises(RedisUnfitError, about="rights"):
                back_up(user("%R~fedmoe:*", *all_but(BACKUP_USER, right)), tmp_path / "b")
        assert os.listdir(tmp_path) == []
        back_up(user("%R~fedmoe:*", *BACKUP_USER), tmp_path / "b")
        backup = Backup(tmp_path / "b")
        for right in RESTORE_USER:
            with raises(RedisUnfitError, about="rights"):
                restore(user("~fedmoe:*", *all_but(RESTORE_USER, right)), backup, replace=True)
            assert content(connection) == before
        restore(user("~fedmoe:*", *RESTORE_USER), backup, replace=True)
        assert content(connection) == before
    finally:
        admin.execute_command("ACL", "DELUSER", "keeper")


def test_a_full_redis_refuses_a_restore_as_a_whole(connection: Connection, tmp_path: Path) -> None:
    """What was there stays, also when it is to be replaced; with memory it works."""
    make(connection)
    before = content(connection)
    backup = backed_up(connection, tmp_path / "b")
    connection.client.config_set("maxmemory", 1)
    try:
        with raises(RedisUnavailableError, about="maxmemory"):
            restore(BackupStore(connection), backup, replace=True)
    finally:
        connection.client.config_set("maxmemory", 0)
    assert content(connection) == before
    restore(BackupStore(connection), backup, replace=True)
    assert content(connection) == before
