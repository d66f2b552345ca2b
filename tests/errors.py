"""Errors in tests: compared by type and field, as a program would, not by their sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from fedmoe.errors import FedMoEError

E = TypeVar("E", bound=FedMoEError)


@contextmanager
def raises(
    kind: type[E] | tuple[type[E], ...], *, about: str, cause: type[Exception] | None = None
) -> Iterator[pytest.ExceptionInfo[E]]:
    """Expect an error of this type about this one thing; with `cause`, also raised because of that exception."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.about == about, str(caught.value)
    if cause:
        assert isinstance(caught.value.__cause__, cause)
