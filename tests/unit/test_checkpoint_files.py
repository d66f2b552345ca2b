"""The files of a checkpoint: little is written, all is restored to the bit, and it may be killed at any moment."""

import json
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import producers.checkpoint
from fedmoe.errors import SettingsError
from fedmoe.protocol import codec
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.packed import chunks, pack, unpack
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import UpdateId, make_run
from producers.checkpoint import Checkpoint, StateDir
from producers.ledger import Ledger, Outgoing, Trained
from tests.errors import raises
from tests.federation import first_meta, small_spec

HALF = 4096
LAYOUT = Layout.of([("x.lora_A.weight", (8, HALF // 8)), ("x.lora_B.weight", (HALF // 8, 8))])


class Killed(BaseException):
    """The process is gone: no handler sees it."""


def make_ledger(spec: Spec) -> Ledger:
    """Books on weights that were pulled as they are pulled in this spec's format."""
    torch.manual_seed(1)
    weights = initial_weights(spec.layout, spec.init_seed) + 0.01 * torch.randn(spec.layout.numel)
    meta = first_meta(spec)
    packed: tuple[bytes, ...] = ()
    if spec.wire_format != "fp32":
        whole = pack(weights, spec, meta.weights_commit)
        packed = tuple(whole[first : last + 1] for first, last in chunks(spec))
        unpacked = unpack(packed, spec, meta.weights_commit)
        assert unpacked is not None
        weights = unpacked
    return Ledger(base=weights, packed=packed, meta=meta, run=make_run(1, "00000001"))


def cut(ledger: Ledger, number: int) -> None:
    """One more update in the queue; the one before it is decided."""
    ledger.kept += ledger.queue
    ledger.queue = []
    trained = Trained(n_examples=number, steps=1, position=str(number))
    delta = torch.full((len(ledger.base),), float(number))
    ledger.make_update(codec.cut(delta, ledger_format(ledger)), trained, fingerprint="f")


def ledger_format(ledger: Ledger) -> str:
    return "int4" if ledger.packed else "fp32"


def checkpoint_of(ledger: Ledger, position: int) -> Checkpoint:
    local = ledger.base + float(position)
    optimizer = {"exp_avg": local * 2, "exp_avg_sq": local * 3, "step": torch.tensor(float(position))}
    return Checkpoint(
        ledger=ledger, local=local, optimizer=optimizer, trained=Trained(steps=position), position=position,
        data="d", expert="sql_expert", worker="alice",
    )  # fmt: skip


def load(path: Path, spec: Spec) -> Checkpoint:
    with closing(StateDir(path)) as state:
        saved = state.load(expert="sql_expert", worker="alice", spec=spec, now=0.0)
    assert saved is not None
    return saved


def content(checkpoint: Checkpoint) -> tuple[Any, ...]:
    """All of a checkpoint, comparable."""
    books = checkpoint.ledger
    tensors = {"local": checkpoint.local, "base": books.base, **checkpoint.optimizer}
    return (
        {name: tensor.numpy().tobytes() for name, tensor in tensors.items()},
        [(u.header, u.parts) for u in books.queue], [(u.header, u.parts) for u in books.kept],
        (books.meta.commit, books.run, books.seq, books.start, books.packed),
        (checkpoint.trained, checkpoint.position, checkpoint.data),
    )  # fmt: skip


def files(path: Path) -> dict[Path, tuple[int, int]]:
    """Of each file: which one it is, and its bytes."""
    found = {file: file.stat() for file in path.rglob("*") if file.is_file()}
    return {file: (stat.st_ino, stat.st_size) for file, stat in found.items()}


@pytest.mark.parametrize("wire_format", ["int4", "fp32"])
def test_all_is_restored_to_the_bit(tmp_path: Path, wire_format: str) -> None:
    """The base, too, though it is stored packed; a second save after the load is the same again."""
    spec = small_spec(layout=LAYOUT, wire_format=wire_format)
    ledger = make_ledger(spec)
    for number in (1, 2, 3):
        cut(ledger, number)
    before = checkpoint_of(ledger, 7)
    state = StateDir(tmp_path)
    state.save(before)
    state.close()
    state = StateDir(tmp_path)
    again = state.load(expert="sql_expert", worker="alice", spec=spec, now=0.0)
    assert again is not None
    assert content(again) == content(before)
    there = files(tmp_path / "updates")
    state.save(again)
    assert files(tmp_path / "updates") == there
    state.close()
    assert content(load(tmp_path, spec)) == content(before)


def test_checkpoint_writes_at_most_four_times_the_weights(tmp_path: Path) -> None:
    """In the default format, with an update in flight and six that are kept, in the steady state."""
    layout = Layout.of([("x.lora_A.weight", (16, 16_384)), ("x.lora_B.weight", (16_384, 16))])
    spec = small_spec(layout=layout, wire_format="int4")
    ledger = make_ledger(spec)
    state = StateDir(tmp_path)
    for number in range(1, 8):
        cut(ledger, number)
    state.save(checkpoint_of(ledger, 1))
    cut(ledger, 8)
    del ledger.kept[0]
    ledger.start = UpdateId(ledger.run, 1)
    before = files(tmp_path)
    state.save(checkpoint_of(ledger, 2))
    written = sum(
        size for file, (which, size) in files(tmp_path).items() if before.get(file, (0, 0))[0] != which
    )
    assert written <= 4 * 4 * layout.numel
    assert len(list((tmp_path / "updates").iterdir())) == 7
    for name in ("updates", state.file.name):  # they hold what was trained on private rows
        assert not (tmp_path / name).stat().st_mode & 0o077
    state.close()
    assert [u.header.seq for u in load(tmp_path, spec).ledger.kept] == list(range(2, 8))


STEPS = (
    (os, "fsync"),
    (os, "unlink"),
    (Path, "replace"),
    (Path, "unlink"),
    (producers.checkpoint, "save_file"),
)


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    """Before or after each step of a save, until one is done: the old state is there whole, or the new one is."""
    spec = small_spec(layout=LAYOUT, wire_format="int4")
    seen = set()
    for moment in range(1, 100):
        place = tmp_path / str(moment)
        ledger = make_ledger(spec)
        for number in (1, 2):
            cut(ledger, number)
        old = checkpoint_of(ledger, 2)
        state = StateDir(place)
        state.save(old)
        old_content = content(old)
        cut(ledger, 3)
        ledger.start = ledger.kept.pop(0).id  # so there is something to remove
        new = checkpoint_of(ledger, 3)
        with monkeypatch.context() as armed:
            _kill_at(armed, moment, after=after)
            try:
                state.save(new)
                done = True
            except Killed:
                done = False
        state.close()
        found = load(place, spec)
        assert content(found) in (old_content, content(new))
        seen.add(found.position)
        cut(found.ledger, 4)  # and it goes on from there
        state = StateDir(place)
        state.save(checkpoint_of(found.ledger, 4))
        state.close()
        assert load(place, spec).position == 4
        assert len(list((place / "updates").iterdir())) == len(found.ledger.queue) + len(found.ledger.kept)
        if done:
            break
    assert done
    assert seen == {2, 3}


def _kill_at(armed: pytest.MonkeyPatch, moment: int, *, after: bool) -> None:
    """Kill the process at the moment-th step; after that it does nothing any more."""
    count = 0

    def around(step: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > moment:
                raise Killed
            if count == moment and not after:
                raise Killed
            result = step(*args, **kwargs)
            if count == moment:
                raise Killed
            return result

        return stepping

    for owner, name in STEPS:
        armed.setattr(owner, name, around(getattr(owner, name)))


def test_checkpoint_of_the_format_before_is_read(tmp_path: Path) -> None:
    """A worker that is upgraded goes on with its run, its outbox and what it keeps."""
    spec = small_spec(layout=LAYOUT, wire_format="int4")
    ledger = make_ledger(spec)
    for number in (1, 2, 3):
        cut(ledger, number)
    new = checkpoint_of(ledger, 7)
    tensors = {"local": new.local, "base": ledger.base}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in new.optimizer.items()}
    for group, updates in (("queue", ledger.queue), ("kept", ledger.kept)):
        for number, update in enumerate(updates):
            tensors |= _inside(f"{group}.{number:04d}", update)
    meta = asdict(ledger.meta) | {"rules": ledger.meta.rules.to_json()}
    del meta["rolled_back"], meta["tail"], meta["parts"]
    info = {
        "format": "1", "run": ledger.run, "seq": ledger.seq, "start": None, "meta": meta,
        "trained": asdict(new.trained), "position": 7, "data": "d", "expert": "sql_expert", "worker": "alice",
    }  # fmt: skip
    save_file(tensors, tmp_path / "worker.safetensors", metadata={"fedmoe": json.dumps(info)})
    ledger.packed = ()  # which it did not hold
    assert content(load(tmp_path, spec)) == content(new)


@pytest.mark.parametrize("other", ["format", "torch"])
def test_checkpoint_of_another_version_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """It is whole, and the version that wrote it goes on with it."""
    spec = small_spec(layout=LAYOUT, wire_format="int4")
    with monkeypatch.context() as patch:
        if other == "format":
            patch.setattr(producers.checkpoint, "_FORMAT", "9")
        with closing(StateDir(tmp_path)) as state:
            state.save(checkpoint_of(make_ledger(spec), 7))
    with raises(SettingsError, about=other):
        # Another seed stands for another torch: either makes other initial weights.
        load(tmp_path, replace(spec, init_seed=1) if other == "torch" else spec)


def _inside(name: str, update: Outgoing) -> dict[str, torch.Tensor]:
    blobs = (update.header.pack(), *update.parts)
    return {
        f"{name}.{index:06d}": torch.frombuffer(blob, dtype=torch.uint8) for index, blob in enumerate(blobs)
    }
