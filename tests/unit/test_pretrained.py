"""The demo's model is converted once, whole or not at all."""

import importlib.util
from pathlib import Path

import pytest

from fedmoe.demo import pretrained
from fedmoe.demo.pretrained import MODEL_NAME, ensure_demo_model, is_whole
from fedmoe.errors import BaseModelError
from tests.errors import raises


@pytest.fixture
def conversions(monkeypatch, tmp_path) -> list[Path]:
    """Replace the conversion (25 s, 1.3 GB) by one that writes two small files; returns where it was done."""
    done: list[Path] = []

    def convert(gguf: Path, out_dir: Path) -> None:
        done.append(out_dir)
        out_dir.mkdir()
        (out_dir / "config.json").write_text("{}")
        (out_dir / "model.safetensors").write_bytes(b"weights" * 1000)

    monkeypatch.setattr(pretrained, "convert_in_child", convert)
    monkeypatch.setattr(pretrained, "find_gguf", lambda: tmp_path / "model.gguf")
    return done


def ensure(cache_dir: Path) -> Path:
    return ensure_demo_model(cache_dir, report=lambda line: None)


def test_second_call_converts_nothing(conversions, tmp_path):
    """The first call converts and says so; the second returns the same directory in silence."""
    said: list[str] = []
    cache = tmp_path / "deep" / "cache"
    first = ensure_demo_model(cache, report=said.append)
    assert first == cache / MODEL_NAME
    assert is_whole(first)
    assert len(said) == 2
    assert ensure_demo_model(cache, report=said.append) == first
    assert len(conversions) == 1
    assert len(said) == 2
    assert [path.name for path in cache.iterdir()] == [MODEL_NAME]


@pytest.mark.parametrize(
    "damage", ["truncated", "changed", "file gone", "record gone", "record garbage", "empty"]
)
def test_damaged_cache_is_rebuilt(conversions, tmp_path, damage):
    """Whatever happened to the cache, the next call leaves a whole one and nothing beside it."""
    target = ensure(tmp_path / "cache")
    weights, record = target / "model.safetensors", target / pretrained.RECORD
    match damage:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:100])
        case "changed":
            weights.write_bytes(weights.read_bytes()[:-1] + b"?")
        case "file gone":
            weights.unlink()
        case "record gone":
            record.unlink()
        case "record garbage":
            record.write_text("[1]")
        case "empty":
            for path in target.iterdir():
                path.unlink()
    assert not is_whole(target)
    assert ensure(tmp_path / "cache") == target
    assert is_whole(target)
    assert len(conversions) == 2
    assert [path.name for path in target.parent.iterdir()] == [MODEL_NAME]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, BaseModelError("no", about="gguf"), OSError(28, "No space left on device")]
)
def test_interrupted_conversion_leaves_nothing(conversions, monkeypatch, tmp_path, error):
    """Ctrl-C, a failure or a full disk in the middle leave the cache directory as it was."""

    def convert(gguf: Path, out_dir: Path) -> None:
        out_dir.mkdir()
        (out_dir / "config.json").write_text("{")
        raise error

    monkeypatch.setattr(pretrained, "convert_in_child", convert)
    with pytest.raises((KeyboardInterrupt, BaseModelError)):
        ensure(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_wheel_says_how_to_install_it(monkeypatch, tmp_path):
    """Without the wheel one sentence names the command that brings it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with raises(BaseModelError, about="model"):
        ensure(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_failed_conversion_gives_its_reason(monkeypatch, tmp_path):
    """A child process that fails comes back as one sentence with the last line it wrote, not a traceback."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho Traceback: many lines >&2\necho 'ValueError: not a GGUF' >&2\nexit 1\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(pretrained.sys, "executable", str(python))
    with pytest.raises(BaseModelError) as caught:
        pretrained.convert_in_child(tmp_path / "broken.gguf", tmp_path / "out")
    assert str(caught.value) == "broken.gguf could not be converted to safetensors: ValueError: not a GGUF"


def test_cache_that_cannot_be_written_is_named(conversions, tmp_path):
    """A file where the cache should be gives one sentence with its name."""
    (tmp_path / "file").write_text("")
    with raises(BaseModelError, about="cache"):
        ensure(tmp_path / "file")
