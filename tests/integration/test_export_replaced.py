"""An export that is replaced while others read it, and one that is killed in the middle, at each step of it."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from peft import PeftConfig
from peft.utils.save_and_load import load_peft_weights

from fedmoe.errors import SettingsError
from fedmoe.protocol.layout import AdapterBuffer, Layout
from fedmoe.tools.export import Export
from fedmoe.tools.export_files import FILES, write
from fedmoe.tools.heldout import read_directory
from fedmoe.util.versions import CURRENT, HOME, KEEP_S, version_of
from tests.errors import raises

pytestmark = pytest.mark.one_server

OLD, NEW = 2, 3


def adapter(rank: int, **config: object) -> Export:
    """An adapter of which the configuration and every value tell the rank."""
    buffer = AdapterBuffer(Layout.of([("q.lora_A.weight", (rank, 4)), ("q.lora_B.weight", (4, rank))]))
    buffer.flat.fill_(float(rank))
    return Export(
        name="gateway", file=bytes(buffer.file), behind={}, info={"base_model": "org/tiny"},
        config={"peft_type": "LORA", "r": rank, "lora_alpha": 2.0 * rank, "target_modules": ["q"]} | config,
        built_from={"a": {"version": rank, "weights_commit": "c"}},
    )  # fmt: skip


def loaded(directory: Path) -> tuple[int, int]:
    """The ranks that peft's own loader finds in the configuration and in the weights."""
    config = PeftConfig.from_pretrained(str(directory))
    weights = load_peft_weights(str(directory), device="cpu")
    return int(config.r), int(weights["q.lora_A.weight"][0, 0])


def plain_export(directory: Path, export: Export) -> None:
    """A directory as FedMoE wrote it before it kept versions."""
    write(directory, export)
    for name in FILES:
        content = (directory / name).read_bytes()
        (directory / name).unlink()
        (directory / name).write_bytes(content)
    shutil.rmtree(directory / HOME)


def at_each_step(run: Callable[[], object], look: Callable[[], None]) -> int:
    """Call `look` after each call of `run` that the operating system may see; how often that was."""
    steps = 0

    def seen(frame: FrameType, event: str, called: Any) -> None:
        nonlocal steps
        if event == "c_return" and getattr(called, "__module__", "") in ("posix", "fcntl", "_io"):
            sys.setprofile(None)
            steps += 1
            look()
            sys.setprofile(seen)

    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return steps


@pytest.mark.parametrize("before", ["versions", "plain"])
def test_a_reader_sees_the_old_or_the_new_adapter_at_each_step(tmp_path: Path, before: str) -> None:
    """Also one that found its version at any earlier step; a directory of an earlier FedMoE is no exception."""
    out = tmp_path / "out"
    (write if before == "versions" else plain_export)(out, adapter(OLD))
    found: list[tuple[Path, int]] = []

    def look() -> None:
        version = version_of(out)
        rank, values = loaded(version)
        assert rank == values
        assert loaded(out) == (rank, rank)
        if not found or found[-1] != (version, rank):
            found.append((version, rank))
        if version != out:
            assert all(loaded(earlier) == (known, known) for earlier, known in found if earlier != out)

    assert at_each_step(lambda: write(out, adapter(NEW)), look) > 20
    ranks = [rank for _, rank in found]
    assert ranks == sorted(ranks)
    assert set(ranks) == {OLD, NEW}


@pytest.mark.parametrize("before", ["nothing", "versions", "plain"])
def test_whatever_a_killed_export_leaves_the_next_one_tidies(tmp_path: Path, before: str) -> None:
    """Killed after each change: a reader finds what was there, the next export goes on, and nothing stays beside it."""
    out, killed = tmp_path / "out", tmp_path / "killed"
    if before != "nothing":
        (write if before == "versions" else plain_export)(out, adapter(OLD))
    left: list[Path] = []
    seen: set[str] = set()

    def keep() -> None:
        tree = str([(path, path.is_symlink() and os.readlink(path)) for path in sorted(out.rglob("*"))])
        if out.exists() and tree not in seen:
            seen.add(tree)
            left.append(killed / str(len(left)) / "out")
            shutil.copytree(out, left[-1], symlinks=True)

    at_each_step(lambda: write(out, adapter(NEW)), keep)
    assert len(left) > 5
    for copy in left:
        if before != "nothing":
            assert loaded(version_of(copy)) in ((OLD, OLD), (NEW, NEW))
        later = time.time() - KEEP_S - 1
        for version in (copy / HOME).glob("v-*"):
            os.utime(version, (later, later))
        write(copy, adapter(4))
        assert loaded(copy) == (4, 4)
        assert sorted(path.name for path in copy.iterdir()) == sorted([*FILES, HOME])
        versions = [path for path in (copy / HOME).iterdir() if path.name != CURRENT]
        assert len(versions) <= 3  # the new one, the old one, and a killed adoption of plain files
        assert version_of(copy) in versions
        assert [path.name for path in copy.parent.iterdir()] == ["out"]


def test_a_replaced_version_stays_for_its_readers_and_then_goes(tmp_path: Path) -> None:
    """Every export removes those that were replaced KEEP_S ago."""
    write(tmp_path, adapter(OLD))
    old = version_of(tmp_path)
    for _ in range(3):
        write(tmp_path, adapter(NEW))
    assert loaded(old) == (OLD, OLD)
    assert len(list((tmp_path / HOME).iterdir())) == 5
    long_ago = time.time() - KEEP_S - 1
    for version in (tmp_path / HOME).glob("v-*"):
        os.utime(version, (long_ago, long_ago))
    write(tmp_path, adapter(NEW))
    assert not old.exists()
    assert len(list((tmp_path / HOME).iterdir())) == 3  # the current one, the link to it, the one before


def test_a_directory_that_was_copied_or_moved_can_be_exported_to(tmp_path: Path) -> None:
    """Links kept, links followed, and only the four files of it."""
    write(tmp_path / "a", adapter(OLD))
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    (tmp_path / "d").mkdir()
    for name in FILES:
        shutil.copy(tmp_path / "a" / name, tmp_path / "d")
    (tmp_path / "a").rename(tmp_path / "e")
    for copy in ("b", "c", "d", "e"):
        assert loaded(tmp_path / copy) == (OLD, OLD)
        write(tmp_path / copy, adapter(NEW))
        assert loaded(tmp_path / copy) == (NEW, NEW)
        assert json.loads((tmp_path / copy / "fedmoe.json").read_text())["built_from"]["a"]["version"] == NEW


def test_what_readers_could_mix_unnoticed_is_refused(tmp_path: Path) -> None:
    """Another scaling or other targets fit the same shapes; another rank does not, and is only said."""
    assert write(tmp_path, adapter(OLD)) == ""
    assert write(tmp_path, adapter(OLD)) == ""
    with raises(SettingsError, about="lora_alpha / r"):
        write(tmp_path, adapter(OLD, lora_alpha=1.0))
    with raises(SettingsError, about="target_modules"):
        write(tmp_path, adapter(OLD, target_modules=["k"]))
    assert loaded(tmp_path) == (OLD, OLD)
    assert "load the adapter again" in write(tmp_path, adapter(NEW))
    assert "load the adapter again" in write(tmp_path, adapter(NEW, lora_alpha=1.0), force=True)


def test_evaluate_reads_one_version(tmp_path: Path) -> None:
    """`fedmoe evaluate --adapter` follows the link once, and reads what others saved as it lies."""
    write(tmp_path, adapter(OLD))
    assert read_directory(tmp_path).config["r"] == OLD
    shutil.rmtree(tmp_path / HOME)
    with raises(SettingsError, about="adapter_config.json"):
        read_directory(tmp_path)


def test_staging_folders_of_an_earlier_fedmoe_are_removed(tmp_path: Path) -> None:
    """Those an hour old that hold nothing else, in the directory and beside it."""
    out = tmp_path / "out"
    out.mkdir()
    old, fresh, foreign = (
        tmp_path / ".fedmoe-01234567",
        out / ".fedmoe-89abcdef",
        tmp_path / ".fedmoe-00000000",
    )
    for folder in (old, fresh, foreign):
        folder.mkdir()
    (old / "adapter_config.json").write_text("{}")
    (foreign / "mine").write_text("")
    for folder in (old, foreign):
        os.utime(folder, (1e9, 1e9))
    write(out, adapter(OLD))
    assert [folder.exists() for folder in (old, fresh, foreign)] == [False, True, True]
