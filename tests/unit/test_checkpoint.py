"""The state directory: one worker each, and no checkpoint that cannot be gone on from."""

import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmoe.errors import SettingsError
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Part, make_run
from producers.checkpoint import Checkpoint, StateDir
from producers.ledger import Ledger, Trained
from tests.errors import raises
from tests.federation import LAYOUT, first_meta, small_spec
from tests.processes import eventually


def load(state: StateDir, spec: Spec) -> Checkpoint | None:
    return state.load(expert="sql_expert", worker="alice", spec=spec, now=0.0)


def test_directory_belongs_to_one_process(tmp_path: Path) -> None:
    """A second worker on the same directory is refused, not mixed up with the first; later it may have it."""
    hold = "import sys, pathlib; from producers.checkpoint import StateDir\n"
    hold += "d = StateDir(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    first = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with raises(SettingsError, about="lock"):
        StateDir(tmp_path)
    first.communicate()
    StateDir(tmp_path)


@pytest.mark.parametrize("group", ["queue", "kept"])
@pytest.mark.parametrize("part", [b"garbage", None])
def test_update_that_cannot_be_decoded_is_noticed_at_once(
    tmp_path: Path, group: str, part: bytes | None
) -> None:
    """Of a damaged file, or of a FedMoE that cut updates into other parts; None is the update as it was."""
    spec = small_spec(wire_format="int4")
    ledger = Ledger(base=torch.zeros(LAYOUT.numel), meta=first_meta(spec), run=make_run(1, "00000001"))
    update = ledger.make_update(
        ledger.cut(torch.ones(LAYOUT.numel), "int4"), Trained(steps=1), fingerprint="f"
    )
    if part is not None:
        update = replace(update, header=replace(update.header, parts=(Part.of(part),)), parts=(part,))
    ledger.queue, ledger.kept = ([update], []) if group == "queue" else ([], [update])
    state = StateDir(tmp_path)
    state.save(
        Checkpoint(
            ledger=ledger, local=torch.ones(LAYOUT.numel), optimizer={}, trained=Trained(), position=0, data="d",
            expert="sql_expert", worker="alice",
        )
    )  # fmt: skip
    if part is None:
        saved = load(state, spec)
        assert saved is not None
        assert [u.id for u in (*saved.ledger.queue, *saved.ledger.kept)] == [update.id]
    else:
        with raises(SettingsError, about="checkpoint"):
            load(state, spec)


def test_disk_that_takes_no_more_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """An OSError, which the sync tells and waits for, whatever wrote the file; the state on disk is the last one."""
    state = StateDir(tmp_path)
    ledger = Ledger(
        base=torch.zeros(LAYOUT.numel), meta=first_meta(small_spec()), run=make_run(1, "00000001")
    )
    checkpoint = Checkpoint(
        ledger=ledger, local=torch.ones(LAYOUT.numel), optimizer={"step": torch.tensor(3.0)}, trained=Trained(),
        position=1, data="d", expert="sql_expert", worker="alice",
    )  # fmt: skip
    state.save(checkpoint)
    assert not state.file.stat().st_mode & 0o077  # it holds what was trained on private rows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            state.save(replace(checkpoint, position=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["id", "lock", "updates", state.file.name]
    saved = load(state, small_spec())
    assert saved is not None
    assert saved.position == 1


def test_what_a_killed_writer_left_is_tidied_up(tmp_path: Path) -> None:
    """Each could be as large as a checkpoint, and a worker that is killed again and again would fill the disk."""
    script = (
        "import sys, pathlib, torch; from producers.checkpoint import StateDir, save_file\n"
        "state = StateDir(pathlib.Path(sys.argv[1])); print('held', flush=True)\n"
        "while True: save_file({'x': torch.zeros(5_000_000)}, state.file.with_suffix('.new'))"
    )
    for _ in range(20):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "held\n"
            eventually("a file being written", lambda: any(tmp_path.glob(".tmp*")))
            writer.kill()
        if any(tmp_path.glob(".tmp*")):
            break
    else:
        pytest.fail("the writer was never killed while it wrote")
    StateDir(tmp_path)
    assert not list(tmp_path.glob(".tmp*"))
