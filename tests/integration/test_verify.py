"""`fedmoe verify`: the replay of the log is the expert, byte for byte, and what is not is named."""

import os
import stat
import sys
from pathlib import Path

import pytest
import torch

from consumers.expert import Expert
from fedmoe.cli.main import main
from fedmoe.errors import SettingsError
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.store.archive import WEIGHTS_SUFFIX, Archive
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from tests.errors import raises
from tests.federation import LAYOUT, ScriptedWorker, first_meta, serve, small_spec

pytestmark = pytest.mark.one_server


@pytest.fixture
def expert(connection: Connection, tmp_path: Path) -> Expert:
    """An expert at its real version 0, whose aggregator keeps updates."""
    spec = small_spec(wire_format="int8")
    buffer = AdapterBuffer(spec.layout)
    buffer.flat.copy_(initial_weights(spec.layout, spec.init_seed))
    store = ExpertStore(connection, "sql_expert")
    store.create(spec, first_meta(spec), buffer.file, gateway_weight=1.0)
    expert = Expert(store, spec, aggregator="test", archive=Archive(tmp_path / "sql_expert"))
    expert.load()
    return expert


def train(connection: Connection, expert: Expert, rounds: int = 3) -> None:
    """Updates of three workers, some stale, one sent twice, one refused."""
    workers = [ScriptedWorker(connection, expert.spec, name) for name in ("alice", "bob", "carol")]
    for number in range(rounds):
        for worker in workers:
            torch.manual_seed(number)
            worker.push(torch.randn(LAYOUT.numel))
            worker.publish()
        serve(expert)
        for worker in workers:
            worker.pull()
    workers[0].push(1e6)
    assert serve(expert) == ["refused"]


def verify(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, url: str, kept: Path
) -> tuple[int, str]:
    """Exit code and output of the command."""
    monkeypatch.setattr(sys, "argv", ["fedmoe", "verify", "--redis", url, "--keep-updates", str(kept)])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out + captured.err


def test_replay_equals_redis(
    connection: Connection, redis_url: str, expert: Expert, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nine updates of different staleness: equal, exit code 0."""
    train(connection, expert)
    assert expert.meta.staleness_sum > 0
    code, text = verify(capsys, monkeypatch, redis_url, tmp_path)
    assert (code, text) == (0, "sql_expert: replayed 9 of 9 updates, equal\n")


@pytest.mark.parametrize("damage", ["weights", "file", "missing", "log", "factor"])
def test_what_does_not_fit_is_named(
    connection: Connection, redis_url: str, expert: Expert, tmp_path: Path, damage: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One changed bit of the weights, a damaged or missing file, a line gone or edited: differs, exit code 1."""
    train(connection, expert)
    redis, keys = connection.client, expert.store.keys
    lines = redis.xrange(keys.log)
    fourth, fields = lines[3]
    file = tmp_path / "sql_expert" / (fields[b"update"].decode() + ".update")
    expected = {
        "weights": "is damaged: its weights have digests",
        "file": "version 4: the file of update",
        "missing": "version 4: the file of update",
        "log": "version 4: the log goes from version 3 to 5",
        "factor": "version 1: factor 0.125",
    }[damage]
    if damage == "weights":
        last = redis.getrange(keys.weights, -1, -1)
        redis.setrange(keys.weights, expert.spec.layout.file_bytes - 1, bytes([last[0] ^ 1]))
    elif damage == "file":
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
    elif damage == "missing":
        file.unlink()
    elif damage == "log":
        redis.xdel(keys.log, fourth)
    else:
        redis.delete(keys.log)
        for _, line in lines:
            redis.xadd(keys.log, line | {b"factor": b"0.125"})
    code, text = verify(capsys, monkeypatch, redis_url, tmp_path)
    assert code == 1
    assert expected in text
    assert "Traceback" not in text


def test_nothing_is_applied_that_cannot_be_kept(
    connection: Connection, expert: Expert, tmp_path: Path
) -> None:
    """A full disk at the archive: the update waits, nothing is lost, and it counts once there is room."""
    ScriptedWorker(connection, expert.spec).push(1.0)
    kept = tmp_path / "sql_expert"
    kept.rmdir()
    kept.write_bytes(b"in the way")
    with raises(SettingsError, about="keep_updates", cause=OSError):
        serve(expert)
    kept.unlink()
    kept.mkdir()
    expert.load()
    assert serve(expert) == ["applied"]
    assert expert.meta.version == 1


def test_what_is_kept_is_on_disk_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes, and then the directory that names them: a commit that follows may outlive a crash of the machine."""
    archive, synced, sync = Archive(tmp_path), [], os.fsync

    def note(opened: int) -> None:
        synced.append(
            (stat.S_ISDIR(os.fstat(opened).st_mode), len(list(tmp_path.glob("*" + WEIGHTS_SUFFIX))))
        )
        sync(opened)

    monkeypatch.setattr(os, "fsync", note)
    archive.keep_weights(b"weights")
    assert synced == [(False, 0), (True, 1)]
