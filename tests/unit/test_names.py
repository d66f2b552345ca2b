"""fedmoe.protocol.names: what may stand in a key."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedmoe.errors import SettingsError
from fedmoe.protocol.names import RESERVED_EXPERTS, check_expert, check_name, clean_name, is_name
from tests.errors import raises
from tests.strategies import names


@given(names())
def test_valid_names_are_names(name: str) -> None:
    """Letters, digits, `_`, `-`, and `.` in the middle, up to 64 characters."""
    assert is_name(name)
    assert check_name("worker", name) == name
    assert clean_name(name) == (name.strip(".-") or "worker")


@given(st.text(max_size=70))
@example("My Host.local")
@example("." * 70)
@example("x" * 63 + ".y")
def test_any_text_can_be_cleaned_to_a_name(text: str) -> None:
    """The result of clean_name is always a name."""
    assert is_name(clean_name(text))


@given(names(), st.sampled_from(":*?[]{}\\/ \n\0é\u0661"), st.integers(0, 64))
def test_one_forbidden_character_spoils_a_name(name: str, character: str, place: int) -> None:
    """What would move a key's borders or match as a glob is refused wherever it stands."""
    assert not is_name(name[:place] + character + name[place:])


@pytest.mark.parametrize("name", ["", ".", ".a", "a.", "a\n", "x" * 65, "..", "a:b"])
def test_bad_names_are_refused_with_the_rule(name: str) -> None:
    """The message holds the kind, the name and the rule."""
    with pytest.raises(SettingsError, match=r"worker .* cannot be used: take letters"):
        check_name("worker", name)


@pytest.mark.parametrize("name", sorted(RESERVED_EXPERTS))
def test_reserved_names_are_no_experts(name: str) -> None:
    """An expert may not be called like FedMoE's own keys."""
    with raises(SettingsError, about="expert"):
        check_expert(name)


def test_expert_names() -> None:
    """Any other name will do."""
    assert check_expert("sql_expert") == "sql_expert"
