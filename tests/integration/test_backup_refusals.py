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

from fedmoe.errors import BackupError, FedMoEError, RedisUnavailableError, UnknownExpertError
from fedmoe.settings import RedisSettings
from fedmoe.store.backup import BackupStore, ExpertState
from fedmoe.store.connection import Connection
from fedmoe.tools.backup import Backup, back_up, restore
from tests.backups import NAME, backed_up, content, make
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
    with pytest.raises(BackupError, match=rf"the backup is damaged: .*{path}") as caught:
        restore(BackupStore(connection), Backup(tmp_path / "b"))
    assert "\n" not in str(caught.value)
    assert connection.client.keys() == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": 3}, "has format 3, this FedMoE reads 2: upgrade it"),
        ({"format": 1}, "has format 1, this FedMoE reads 2: restore it with the FedMoE that made it"),
        ({"format": None}, "is damaged or not of a FedMoE backup"),
        ({"experts": {}}, "there are no experts in the backup"),
        ({"experts": []}, "is damaged"),
        ({"experts": {"../b/sql_expert": NAME}}, "is damaged"),
        ({"experts": {NAME: {"version": 1}}}, "is damaged"),
        ({NAME: {"version": 3}}, "it describes another state of sql_expert than the backup holds"),
        ({NAME: {"gateway_weight": "nan"}}, "is damaged"),
        (
            {NAME: {"files": ["adapter_model.safetensors", "adapter_config.json", "expert.json"]}},
            "is damaged",
        ),
    ],
)
def test_a_manifest_that_is_none_is_one_sentence(
    connection: Connection, tmp_path: Path, change: dict[str, Any], sentence: str
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
    with pytest.raises(BackupError, match=sentence):
        restore(BackupStore(connection), Backup(tmp_path / "b"))
    assert connection.client.keys() == []


def test_what_is_no_backup_is_one_sentence(connection: Connection, tmp_path: Path) -> None:
    """No directory, no manifest, no JSON, an expert it does not hold."""
    with pytest.raises(BackupError, match=f"there is no directory {tmp_path / 'none'}"):
        Backup(tmp_path / "none")
    with pytest.raises(BackupError, match=r"is not a backup: it has no manifest\.json"):
        Backup(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff{")
    with pytest.raises(BackupError, match="is damaged or not of a FedMoE backup"):
        Backup(tmp_path)
    make(connection)
    backup = backed_up(connection, tmp_path / "b")
    with pytest.raises(UnknownExpertError, match=r"no expert 'x' in the backup .*/b; there are: sql_expert"):
        restore(BackupStore(connection), backup, ["x"])


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("spec", "{}", "sql_expert: the stored spec is malformed"),
        (
            "spec",
            None,
            "sql_expert: its parts do not belong together .its spec has digest .* its meta expects",
        ),
        ("weights", "short", "sql_expert: the stored weights .* are not an adapter"),
        ("weights", "", "expert 'sql_expert' has no weights in Redis"),
    ],
)
def test_what_cannot_be_restored_is_not_backed_up(
    connection: Connection, tmp_path: Path, key: str, value: str | None, sentence: str
) -> None:
    """A backup that nothing can be made of would be found out too late; --expert saves the others."""
    make(connection)
    make(connection, "a")
    value = small_spec(wire_format="int8").to_json() if value is None else value
    connection.client.set(f"fedmoe:{{sql_expert}}:{key}", value)
    with pytest.raises(FedMoEError, match=sentence):
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
    with pytest.raises(
        BackupError, match=f"do not belong together .* its meta expects {'0' * 16}\\): use another backup"
    ):
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
        with pytest.raises(BackupError, match="entries of its log are not in order"):
            bad.check(NAME)


def test_nothing_to_back_up_is_one_sentence(connection: Connection, tmp_path: Path) -> None:
    """No experts, an unknown one, a weight that is no number, a name that would lead out of the directory."""
    with pytest.raises(BackupError, match="there are no experts in Redis under the prefix 'fedmoe'"):
        backed_up(connection, tmp_path / "b")
    make(connection)
    with pytest.raises(UnknownExpertError, match=r"no expert 'x' in Redis .*; there are: sql_expert"):
        backed_up(connection, tmp_path / "b", "x")
    connection.client.hset("fedmoe:experts", NAME, "much")
    with pytest.raises(BackupError, match="the gateway weight of sql_expert is 'much', not a number"):
        backed_up(connection, tmp_path / "b")
    connection.client.hset("fedmoe:experts", "../../x", "1")
    with pytest.raises(FedMoEError, match="cannot be used"):
        backed_up(connection, tmp_path / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(BackupError, match="is a file"):
        backed_up(connection, tmp_path / "file")
    connection.client.delete("fedmoe:experts")
    connection.client.hset("fedmoe:experts", NAME, "1")
    with pytest.raises(BackupError, match=r"cannot write the backup .* \((Not a directory|File exists)\)"):
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
        with pytest.raises(
            RedisUnavailableError, match=r"^Redis at unix:///nowhere.sock cannot be reached [^\n]*$"
        ):
            command()
    assert os.listdir(tmp_path) == ["b"]


BACKUP_USER = ("+multi", "+exec", "+get", "+hgetall", "+xrange")
RESTORE_USER = ("+multi", "+exec", "+watch", "+exists", "+hget", "+unlink", "+set", "+hset", "+xadd")


def test_the_rights_that_are_documented_are_enough_and_needed(connection: Connection, tmp_path: Path) -> None:
    """With each of them taken away, one sentence; nothing is left on disk, and Redis stays as it was.

    Also without MULTI, where redis-py sends the rest of a transaction nevertheless, command by command.
    """
    make(connection)
    before = content(connection)
    admin, refused = connection.client, "does not let this user run"

    def user(*rights: str) -> BackupStore:
        basis = ("reset", "on", ">pw", "+auth", "+hello", "+unwatch")
        admin.execute_command("ACL", "SETUSER", "keeper", *basis, *rights)
        url = connection.settings.url.replace("unix://", "unix://keeper:pw@")
        return BackupStore(Connection(RedisSettings(url=url)))

    def all_but(rights: tuple[str, ...], missing: str) -> tuple[str, ...]:
        return tuple(right for right in rights if right != missing)

    try:
        for right in BACKUP_USER:
            with pytest.raises(RedisUnavailableError, match=refused):
                back_up(user("%R~fedmoe:*", *all_but(BACKUP_USER, right)), tmp_path / "b")
        assert os.listdir(tmp_path) == []
        back_up(user("%R~fedmoe:*", *BACKUP_USER), tmp_path / "b")
        backup = Backup(tmp_path / "b")
        for right in RESTORE_USER:
            with pytest.raises(RedisUnavailableError, match=refused):
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
        with pytest.raises(RedisUnavailableError, match="is full: raise its maxmemory"):
            restore(BackupStore(connection), backup, replace=True)
    finally:
        connection.client.config_set("maxmemory", 0)
    assert content(connection) == before
    restore(BackupStore(connection), backup, replace=True)
    assert content(connection) == before
