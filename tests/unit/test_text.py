"""fedmoe.util.text: what others wrote cannot move a cursor, whoever prints it."""

import pytest

from fedmoe.util.text import MAX_TEXT_CHARS, counted, printable, printable_lines


@pytest.mark.parametrize(
    ("raw", "safe"),
    [
        ("héllo", "héllo"),
        ("a\x1b[2Jb\nc\r", r"a\x1b[2Jb\nc\r"),
        (b"\xffa", r"\xffa"),
        ("x" * 301, "x" * 300 + "..."),
        ("\x1b" * 300, (r"\x1b" * 300)[:300] + "..."),
    ],
)
def test_text_becomes_one_printable_line(raw: bytes | str, safe: str) -> None:
    """Bytes or text, cut to what a line can show."""
    assert printable(raw) == safe


def test_limit_is_the_callers() -> None:
    """A name has a shorter one; what must be whole has none."""
    assert printable("abcdef", 3) == "abc..."
    assert printable("x" * 2 * MAX_TEXT_CHARS, None) == "x" * 2 * MAX_TEXT_CHARS


def test_one_thing_is_not_many() -> None:
    assert [counted(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]


def test_lines_of_a_message_stay_lines() -> None:
    """A traceback in a log; all else is escaped as ever."""
    assert printable_lines("one\n\x1btwo\r\n" + "x" * 400) == "one\n\\x1btwo\\r\n" + "x" * 400
