"""Records that earlier releases wrote are read for ever: `tests/golden/` holds them as they were written."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import msgpack
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedmoe.errors import ProtocolError
from fedmoe.protocol import features
from fedmoe.protocol.spec import Spec
from producers.checkpoint import FILE_NAME, StateDir
from tests.errors import raises
from tests.record_cases import CASES, CHECKPOINT_WORKER, META, SPEC, make_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden"
RELEASES = sorted(GOLDEN.glob("records-*"))


def test_there_are_records() -> None:
    """The first release's at least."""
    assert [release.name for release in RELEASES][:1] == ["records-1"]


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
@pytest.mark.parametrize("name", CASES)
def test_record_of_an_earlier_release_is_read(release: Path, name: str) -> None:
    """With the same content; what was added since has its default."""
    if name == "header":
        content = msgpack.unpackb((release / "header.msgpack").read_bytes())
    else:
        content = json.loads((release / f"{name}.json").read_text())
    assert CASES[name].read(content) == CASES[name].record


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_checkpoint_of_an_earlier_release_is_resumed(release: Path, tmp_path: Path) -> None:
    """Books, training state and position, to the bit."""
    shutil.copytree(release / "checkpoint", tmp_path / "state")
    spec = Spec.from_json((release / "spec.json").read_text())
    with closing(StateDir(tmp_path / "state")) as state_dir:
        loaded = state_dir.load(expert="sql_expert", worker=CHECKPOINT_WORKER, spec=spec, now=7.0)
    expected = make_checkpoint(tmp_path / "now")
    assert loaded is not None
    assert torch.equal(loaded.local, expected.local)
    assert torch.equal(loaded.ledger.base, expected.ledger.base)
    assert torch.equal(loaded.ledger.pending(), expected.ledger.pending())
    assert torch.equal(loaded.optimizer["step"], expected.optimizer["step"])
    assert loaded.ledger.meta == expected.ledger.meta
    assert [update.header for update in loaded.ledger.kept] == [
        update.header.known_by("", update.parts)
        for update in expected.ledger.kept  # digests as they were
    ]
    assert (loaded.ledger.run, loaded.ledger.seq, loaded.ledger.start) == (
        expected.ledger.run, expected.ledger.seq, expected.ledger.start,
    )  # fmt: skip
    assert (loaded.trained, loaded.position, loaded.data) == (
        expected.trained,
        expected.position,
        expected.data,
    )


def rewritten(directory: Path, **changes: object) -> StateDir:
    """A state directory whose checkpoint another release wrote."""
    make_checkpoint(directory)
    file = directory / FILE_NAME
    with safe_open(file, framework="pt") as handle:
        info = json.loads(handle.metadata()["fedmoe"]) | changes
        tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118  # not a dict
    save_file(tensors, file, metadata={"fedmoe": json.dumps(info)})
    return StateDir(directory)


def test_checkpoint_of_the_next_release_is_resumed(tmp_path: Path) -> None:
    """What it added is left alone."""
    trained = {"n_examples": 1, "n_tokens": 2, "steps": 3, "loss_sum": 4.0, "position": "9", "added_later": 1}
    with closing(rewritten(tmp_path, added_later="x", trained=trained)) as state_dir:
        loaded = state_dir.load(expert="sql_expert", worker=CHECKPOINT_WORKER, spec=SPEC, now=7.0)
    assert loaded is not None
    assert loaded.trained.steps == 3
    assert loaded.ledger.meta == META


def test_checkpoint_that_needs_more_is_not_called_damaged(tmp_path: Path) -> None:
    """It stays where it is, for the release that can read it."""
    with (
        closing(rewritten(tmp_path, requires="signing")) as state_dir,
        raises(ProtocolError, about="requires"),
    ):
        state_dir.load(expert="sql_expert", worker=CHECKPOINT_WORKER, spec=SPEC, now=7.0)
    assert (tmp_path / FILE_NAME).exists()


def test_checkpoint_with_an_update_that_needs_more_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that goes back one release keeps what the later one had trained."""
    with monkeypatch.context() as later:
        later.setattr(features, "UPDATES_REQUIRE", "signing")
        later.setattr(features, "FEATURES", frozenset({"signing"}))
        make_checkpoint(tmp_path)
    with (
        closing(StateDir(tmp_path)) as state_dir,
        raises(ProtocolError, about="requires"),
    ):
        state_dir.load(expert="sql_expert", worker=CHECKPOINT_WORKER, spec=SPEC, now=7.0)
