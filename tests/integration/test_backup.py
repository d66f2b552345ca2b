"""`fedmoe backup` and `restore`: what comes back is what was there, and whatever goes wrong is one sentence."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from consumers.gateway import GatewayBuilder, GatewaySettings
from fedmoe.backup import Backup, back_up, restore
from fedmoe.cli.main import main
from fedmoe.errors import BackupError, FedMoEError, RedisUnavailableError, StaleStateError, UnknownExpertError
from fedmoe.layout import AdapterBuffer
from fedmoe.model.adapter import adapter_layout
from fedmoe.model.base import structure
from fedmoe.spec import LoraSettings, Spec
from fedmoe.store import backup as store_module
from fedmoe.store.backup import BackupStore, ExpertState
from fedmoe.store.connection import Connection, RedisSettings
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from tests.federation import ScriptedWorker, first_meta, make_expert, serve, small_spec
from tests.processes import environment, eventually
from tests.tiny import tiny_config, tiny_model

Connect = Callable[[], Connection]
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
    meta.pop(b"commit"), meta.pop(b"weights_commit")
    return {
        "spec": redis.get(keys.spec), "weights": redis.get(keys.weights), "meta": meta,
        "applied": redis.hgetall(keys.applied), "log": redis.xrange(keys.log), "dead": redis.xrange(keys.dead),
        "weight": redis.hget(connection.keys.experts, name),
    }  # fmt: skip


def backed_up(connection: Connection, directory: Path, *names: str) -> Backup:
    back_up(BackupStore(connection), directory, names)
    return Backup(directory)


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
    redis.hset(keys.applied, odd, odd)
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
        applied=state.applied,
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
    assert f"holds something already: give each backup a name of its own, like {out}-20" in error
    refusal = (
        f"fedmoe: {NAME} is in Redis already, at version 2 (the backup has version 2): --replace puts the backup in "
        "its place and undoes what was applied since, --expert restores others only\n"
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
    with pytest.raises(
        BackupError, match=r"b is in Redis already, at version 2 \(the backup has version 2\)"
    ):
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
    for key in (keys.meta, keys.applied, keys.log, keys.dead):
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
    other, queue = connect(), BackupStore._queue

    def create_then_queue(self: BackupStore, pipe: Any, name: str, state: ExpertState) -> None:
        make_expert(other)
        queue(self, pipe, name, state)

    monkeypatch.setattr(BackupStore, "_queue", create_then_queue)
    with pytest.raises(BackupError, match="in Redis already, at version 0"):
        restore(BackupStore(connection), backup)
    assert GatewayStore(connection).meta(NAME).version == 0
    assert connection.client.xlen("fedmoe:{sql_expert}:log") == 0


def test_commits_that_come_faster_than_the_replacement(
    connection: Connection, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tries again until one gets through, and gives up with a sentence; what is there stays whole."""
    make(connection)
    backup = backed_up(connection, tmp_path / "b")
    other, queue, left = connect(), BackupStore._queue, [3]

    def commit_then_queue(self: BackupStore, pipe: Any, name: str, state: ExpertState) -> None:
        if left[0]:
            left[0] -= 1
            other.client.hset("fedmoe:{sql_expert}:meta", "commit", f"other-{left[0]}")
        queue(self, pipe, name, state)

    monkeypatch.setattr(BackupStore, "_queue", commit_then_queue)
    restore(BackupStore(connection), backup, replace=True)
    assert left == [0]
    assert not GatewayStore(connection).meta(NAME).commit.startswith("other")
    monkeypatch.setattr(store_module, "ATTEMPTS", 2)
    left[0] = 5
    with pytest.raises(BackupError, match="faster than it can be replaced: stop its aggregator"):
        restore(BackupStore(connection), backup, replace=True)
    assert GatewayStore(connection).meta(NAME).commit == "other-3"


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
        ({"format": 2}, "has format 2, this FedMoE reads 1: upgrade it"),
        ({"format": None}, "is damaged or not of a FedMoE backup"),
        ({"experts": {}}, "there are no experts in the backup"),
        ({"experts": []}, "is damaged"),
        ({"experts": {"../b/sql_expert": NAME}}, "is damaged"),
        ({"experts": {NAME: {"version": 1}}}, "is damaged"),
        ({NAME: {"version": 3}}, "it tells of another sql_expert than is there"),
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
        ("spec", None, "sql_expert: its spec has the digest .* its meta names"),
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
    with pytest.raises(BackupError, match=f"its meta names {'0' * 16}: they do not belong together"):
        state.check(NAME)
    connection.client.hset("fedmoe:{sql_expert}:meta", "spec", meta[b"spec"])
    for ids in ([b"2-0", b"1-0"], [b"0-0"], [b"1-1", b"1-1"], [b"18446744073709551616-0"], [b"1"]):
        bad = ExpertState(
            spec=state.spec,
            weights=state.weights,
            meta=meta,
            applied={},
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
    admin, refused = connection.client, "does not let this user do that|NOPERM|EXEC without MULTI"

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
