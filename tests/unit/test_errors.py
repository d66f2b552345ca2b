"""What an error says in fields is there for programs, whatever way the error has come."""

import copy
import inspect
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmoe import errors
from fedmoe.data.chat import NoRoomError
from fedmoe.errors import DamagedExpertError, FedMoEError, LostExpertError, RemovedExpertError, RowError
from fedmoe.protocol.update import ForeignHeaderError

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, FedMoEError)
    and kind not in (LostExpertError, DamagedExpertError, RemovedExpertError, RowError)
]
OWN = [
    LostExpertError("sql_expert", ", but worker ann trains on"),
    DamagedExpertError("sql_expert", "its weights are missing"),
    RemovedExpertError("sql_expert", "2026-01-01"),
    RowError("it is not JSON", ": at 1", about="JSON"),
    NoRoomError("its prompt leaves no room", about="max_length"),
    ForeignHeaderError("its header needs signing", about="requires", needs="signing"),
]


def again(error: FedMoEError) -> FedMoEError:
    """The error from another process."""
    return pickle.loads(pickle.dumps(error))  # noqa: S301  # made in the line itself


@pytest.mark.parametrize("copied", [again, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("error", [*(kind("text", about="lr") for kind in KINDS), *OWN], ids=repr)
def test_a_copy_has_the_same_message_and_fields(
    error: FedMoEError, copied: Callable[[FedMoEError], FedMoEError]
) -> None:
    """Whatever its class takes to be made."""
    other = copied(error)
    assert type(other) is type(error)
    assert (str(other), vars(other)) == (str(error), vars(error))


def test_what_became_of_an_expert_is_in_fields() -> None:
    """The expert's name, and what a sentence tells beside it."""
    lost, damaged, removed = OWN[:3]
    assert vars(lost) == {"about": "sql_expert"}
    assert vars(damaged) == {"about": "sql_expert", "damage": "its weights are missing"}
    assert vars(removed) == {"about": "sql_expert", "when": "2026-01-01"}


def test_about_is_one_short_word() -> None:
    """A name or a noun, wherever the code writes it down."""
    root = Path(errors.__file__).parent.parent
    code = "".join(
        path.read_text()
        for room in ("fedmoe", "producers", "consumers")
        for path in (root / room).rglob("*.py")
    )
    words = set(re.findall(r'about="([^"]*)"', code))
    assert len(words) > 100
    assert [word for word in words if not re.fullmatch(r"[\w.-]{1,25}", word)] == []


def test_no_error_is_raised_without_saying_what_it_is_about() -> None:
    """So mypy finds a `raise` that does not."""
    with pytest.raises(TypeError):
        FedMoEError("text")  # type: ignore[call-arg]  # what the test is about
