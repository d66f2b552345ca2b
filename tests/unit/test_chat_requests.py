"""fedmoe.tools.serve.requests: what of OpenAI's API is understood, and where an answer ends."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

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
            "stream_options": {"include_usage": True}, "user": "somebody", "n": 1, "tools": None, "top_k": None,
            "store": False,
        }
    )  # fmt: skip
    assert request.ignored == ("store", "user", "max_tokens")
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
        ({"top_k": 5}, "top_k"), ({"reasoning_effort": "low"}, "reasoning_effort"), ({"logprob": True}, "logprob"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"), ({"stream": "false"}, "stream"),
        ({"stream_options": {"usage": True}}, "stream_options"), ({"stream_options": True}, "stream_options"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "images": ["a"]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "odd": 1}]}]}, "messages"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused(change: dict[str, Any], about: str) -> None:
    """Instead of an answer that is not what was asked for."""
    with raises(RequestError, about=about):
        read_request(PLAIN | change)


def test_an_answer_can_be_sent_back_and_a_name_is_said_to_be_ignored() -> None:
    """Clients send all fields of an answer, most of them empty; who speaks is no part of the prompt."""
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "42",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
    }
    question = {"role": "user", "content": "why?", "name": "alice"}
    request = read_request(PLAIN | {"messages": [answer, question]})
    assert request.messages == (
        {"role": "assistant", "content": "42"}, {"role": "user", "content": "why?"},
    )  # fmt: skip
    assert request.ignored == ("messages[].name",)


def test_what_a_part_says_of_caches_is_said_to_be_ignored() -> None:
    """LiteLLM sends it for other servers; null is nothing."""
    part = {
        "type": "text",
        "text": "hi",
        "cache_control": {"type": "ephemeral"},
        "prompt_cache_breakpoint": None,
    }
    request = read_request(PLAIN | {"messages": [{"role": "user", "content": [part]}]})
    assert request.messages == ({"role": "user", "content": "hi"},)
    assert request.ignored == ("messages[].content[].cache_control",)


@pytest.mark.parametrize("name", sorted(CompletionCreateParamsBase.__annotations__))
def test_no_field_of_the_api_is_dropped_without_a_word(name: str) -> None:
    """Each is used, refused, or named as ignored, also those that a later client library adds."""
    odd: Any = [3]  # no value of any field
    try:
        said = read_request(PLAIN | {name: odd}).ignored
    except RequestError as error:
        said = (error.about,)
    assert name in said


def test_limits_are_whole_numbers_that_people_can_read() -> None:
    """No 2.14748e+09."""
    with raises(RequestError, about="max_tokens") as caught:
        read_request(PLAIN | {"max_tokens": 0})
    assert str(caught.value) == "max_tokens must be a whole number between 1 and 2147483648"


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
