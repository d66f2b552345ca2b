"""The C compiler that the kernels need."""

import os

import pytest

from fedmoe.errors import SettingsError
from fedmoe.util import compiled


def need_compiler() -> None:
    """Fail in CI, and skip elsewhere, if this machine has no C compiler."""
    try:
        compiled.compiler()
    except SettingsError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI has no C compiler: {error}")
        pytest.skip(str(error))
