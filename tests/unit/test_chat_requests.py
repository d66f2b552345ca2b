"""fedmoe.tools.serve.requests: what of OpenAI's API is understood, and where an answer ends."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.errors import RequestError
from fedmoe.tools.serve.requests import ChatRequest, StopCutter, read_request
from tests.errors import raises

PLAIN = {"model": "gateway", "messages": [{"role": "user", "content": "hi"}]}


def test_a_plain_request_and_a_whole_one() -> None:
    """What is left out is the server's choice; parts of type text are one text; a developer is a system."""
    assert read_request(PLAIN) == ChatRequest(model="gateway", messages=({"role": "user", "content": "hi"},))
    parts = [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]
    request = read_request(
        PLAIN
        | {
            "messages": [{"role": "developer", "content": parts}, *PLAIN["messages"]], "max_tokens": 3,
            "max_completion_tokens": 5, "temperature": 0, "top_p": 0.5, "stop": "\n", "seed": 7, "stream": True,
            "stream_options": {"include_usage": True}, "user": "somebody", "n": 1, "tools": None,
        }
    )  # fmt: skip
    assert request.messages[0] == {"role": "system", "content": "be brief"}
    assert (request.max_tokens, request.temperature, request.top_p, request.seed) == (5, 0.0, 0.5, 7)
    assert (request.stop, request.stream, request.include_usage) == (("\n",), True, True)


@pytest.mark.parametrize(
    ("change", "about"),
    [
        ({"model": ""}, "model"), ({"model": 3}, "model"), ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages"), ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"), ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"), ({"top_p": "1"}, "top_p"), ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"), ({"stop": ["a"] * 5}, "stop"), ({"stop": [""]}, "stop"),
        ({"n": 2}, "n"), ({"tools": [{}]}, "tools"), ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"), ({"seed": 2**64}, "seed"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused(change: dict[str, Any], about: str) -> None:
    """Instead of an answer that is not what was asked for."""
    with raises(RequestError, about=about):
        read_request(PLAIN | change)


def test_no_object_is_refused() -> None:
    """Neither a list nor a number."""
    odd: tuple[Any, ...] = ([], 3, None, "text")
    for content in odd:
        with raises(RequestError, about="body"):
            read_request(content)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=2), st.data())
def test_a_text_is_cut_at_the_first_stop_however_it_comes(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    """In pieces of any length, as in one: the first is the one that is complete first."""
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    cutter, left, sent = StopCutter(stops), text, ""
    while left:
        length = data.draw(st.integers(1, len(left)))
        sent += cutter.cut(left[:length])
        left = left[length:]
        if not cutter.is_done:
            assert text.startswith(sent)
    sent += cutter.cut("", is_last=True)
    assert cutter.is_done == bool(ends)
    assert sent == (text[: min(ends)[1]] if ends else text)
