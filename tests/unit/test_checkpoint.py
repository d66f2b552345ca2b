"""The state directory: one worker each."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedmoe.errors import SettingsError
from producers.checkpoint import StateDir


def test_directory_belongs_to_one_process(tmp_path: Path) -> None:
    """A second worker on the same directory is refused, not mixed up with the first; later it may have it."""
    hold = "import sys, pathlib; from producers.checkpoint import StateDir\n"
    hold += "d = StateDir(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    first = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with pytest.raises(SettingsError, match="another worker on this machine"):
        StateDir(tmp_path)
    first.communicate()
    StateDir(tmp_path)
