"""fedmoe.util.compiled: one library from a C file, kept where only its user may write, and one sentence if not."""

import ctypes
import os
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from fedmoe.errors import SettingsError
from fedmoe.util import compiled
from fedmoe.util.compiled import load
from tests.compilers import need_compiler
from tests.errors import raises

pytestmark = pytest.mark.one_server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory."""
    need_compiler()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedmoe"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A C file."""
    file = tmp_path / "answer.c"
    file.write_text("int answer(void) { return 42; }\n")
    return file


def answer(library: ctypes.CDLL) -> int:
    return int(library.answer())


def test_it_is_compiled_once(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And then loaded, by a process that finds no compiler either; a changed source is another library."""
    assert answer(load(source)) == 42
    (kept,) = cache.iterdir()
    assert cache.stat().st_mode & 0o77 == 0
    monkeypatch.setenv("CC", "false")
    assert answer(load(source)) == 42
    assert [*cache.iterdir()] == [kept]
    source.write_text("int answer(void) { return 43; }\n")
    with raises(SettingsError, about="compiler"):
        load(source)


def test_what_others_may_write_is_not_loaded(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compiled again."""
    load(source)
    (kept,) = cache.iterdir()
    kept.chmod(0o666)
    assert answer(load(source)) == 42
    kept.chmod(0o666)
    monkeypatch.setenv("CC", "false")
    with raises(SettingsError, about="compiler"):
        load(source)


def test_a_damaged_library_is_compiled_again(source: Path, cache: Path) -> None:
    """A disk that was full, for example."""
    load(source)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:-1] + bytes((whole[-1] ^ 1,))):
        kept.write_bytes(damaged)
        assert answer(load(source)) == 42
        assert kept.read_bytes() != damaged


def test_it_is_kept_whatever_the_umask(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many systems let a user's group write by default."""
    before = os.umask(0o002)
    try:
        load(source)
    finally:
        os.umask(before)
    monkeypatch.setenv("CC", "false")
    assert answer(load(source)) == 42


def test_what_is_looked_at_is_what_is_loaded(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who may write the directory puts another file there, right after its owner was looked at."""
    load(source)
    (kept,) = cache.iterdir()
    is_ours = compiled._is_ours

    def late(found: os.stat_result) -> bool:
        kept.rename(kept.with_suffix(".old"))
        kept.write_bytes(b"another library")
        return is_ours(found)

    monkeypatch.setattr(compiled, "_is_ours", late)
    monkeypatch.setenv("CC", "false")
    assert answer(load(source)) == 42


def test_without_a_place_to_keep_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container whose file system is read-only."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    caplog.set_level("INFO")
    assert answer(load(source)) == 42
    (line,) = caplog.messages
    assert "compiled at each start" in line


def test_without_a_directory_that_may_be_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be compiled there."""

    def none(**_: object) -> None:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(compiled.tempfile, "TemporaryDirectory", none)
    with raises(SettingsError, about="TMPDIR"):
        load(source)


def test_without_a_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on PATH nor by the extra; with the extra it is zig's."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(compiled, "find_spec", lambda _: None)
    with raises(SettingsError, about="compiler"):
        load(source)
    monkeypatch.setattr(compiled, "find_spec", lambda name: ModuleSpec(name, None))
    assert compiled.compiler()[-2:] == ("ziglang", "cc")


@pytest.mark.parametrize("command", ["false", "/nowhere/cc --fast", 'cc "'])
def test_a_compiler_that_fails(source: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Or that is not there."""
    monkeypatch.setenv("CC", command)
    with raises(SettingsError, about="compiler"):
        load(source)


def test_an_error_of_the_compiler_is_in_the_sentence(source: Path) -> None:
    """Its first line that names one."""
    source.write_text("int answer(void) { return wrong; }\n")
    with pytest.raises(SettingsError, match="wrong"):
        load(source)
