"""fedmoe.data.shapes: every usual shape of a row gives its turns and weights, and what is not used is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.rows import ANSWER, GOOD, SYSTEM, Message, lines, read_rows, said, user, write

EARLIER = {"role": "assistant", "content": "2"}


SHAPES: dict[str, tuple[dict[str, Any], list[Message]]] = {
    "prompt": ({"prompt": "q", "completion": "a"}, [user("q")]),
    "capitals": ({"Prompt ": "q", "Response": "a"}, [user("q")]),
    "empty prompt": ({"prompt": "", "completion": "a"}, [user("")]),
    "system": ({"system": "s", "prompt": "q", "completion": "a"}, [SYSTEM, user("q")]),
    "prompt, context": ({"prompt": "q", "completion": "a", "context": "c"}, [user("q\n\nc")]),
    "prompt, input": ({"prompt": "q", "input": "i", "completion": "a"}, [user("q\n\ni")]),
    "prompt with its context in it": (
        {"prompt": "c: q", "context": "c\n", "completion": "a"},
        [user("c: q")],
    ),
    "prompt of turns, context": (
        {"prompt": [SYSTEM, user("q")], "context": "c", "completion": "a"},
        [SYSTEM, user("q\n\nc")],
    ),
    "two systems": ({"system": "x", "messages": [SYSTEM, user("q"), ANSWER]}, [SYSTEM, user("q")]),
    "one of two is null": ({"prompt": "q", "completion": None, "response": "a"}, [user("q")]),
    "conversational": ({"prompt": [SYSTEM, user("q")], "completion": [ANSWER]}, [SYSTEM, user("q")]),
    "mixed": ({"prompt": [user("q")], "completion": "a"}, [user("q")]),
    "messages": ({"messages": [SYSTEM, user("q"), ANSWER]}, [SYSTEM, user("q")]),
    "many turns": (
        {"messages": [user("1"), EARLIER, user("3"), ANSWER, user("thanks")]},
        [user("1"), EARLIER, user("3")],
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
        [user("q")],
    ),
    "developer": (
        {"messages": [{"role": "Developer", "content": "s"}, user("q"), ANSWER]},
        [SYSTEM, user("q")],
    ),
    "tool": (
        {"messages": [user("q"), {"role": "function", "content": "r"}, ANSWER]},
        [user("q"), {"role": "tool", "content": "r"}],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        [SYSTEM, user("q")],
    ),
    "Alpaca": ({"instruction": "q", "input": "i", "output": "a"}, [user("q\n\ni")]),
    "Alpaca, no input": ({"instruction": "q", "input": "", "output": "a"}, [user("q")]),
    "Alpaca with the whole text as prompt": (
        {"instruction": "q", "input": "", "output": "a", "prompt": "### Instruction: q ### Response: a"},
        [user("q")],
    ),
    "Alpaca, history": (
        {"instruction": "q", "output": "a", "history": [["1", "2"]]},
        [user("1"), EARLIER, user("q")],
    ),
    "Dolly": ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, [user("q\n\nc")]),
    "SQL": ({"question": "q", "context": "c", "answer": "a"}, [user("q\n\nc")]),
    "input, output": ({"input": "q", "output": "a"}, [user("q")]),
    "query, response": ({"query": "q", "response": "a", "type": "x"}, [user("q")]),
}


@pytest.mark.parametrize(("row", "prompt"), SHAPES.values(), ids=SHAPES)
def test_every_well_known_shape(tmp_path: Path, row: dict[str, Any], prompt: list[Message]) -> None:
    """Each gives the turns before the answer, and the assistant's last turn as the answer."""
    (read,) = read_rows(write(tmp_path, lines(row))).rows
    assert said(read) == [*prompt, ANSWER]


WEIGHTS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "OpenAI": (
        {"messages": [user("1"), EARLIER | {"weight": 0}, user("q"), ANSWER | {"weight": 1}]},
        [0, 1],
    ),
    "fraction": ({"messages": [user("1"), EARLIER | {"weight": 0.25}, user("q"), ANSWER]}, [0.25, 1]),
    "axolotl": ({"messages": [user("1"), EARLIER | {"train": False}, ANSWER | {"train": True}]}, [0, 1]),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "loss": False}]},
        [0],
    ),
    "null": ({"messages": [user("q"), ANSWER | {"weight": None}]}, [1]),
    "of the row": (GOOD | {"weight": 0.5}, [0.5]),
    "of row and turn": ({"weight": 0.5, "messages": [user("q"), ANSWER | {"weight": 0.5}]}, [0.25]),
    "KTO, undesired": (GOOD | {"label": False}, [0]),
    "KTO, desired": (GOOD | {"label": True}, [1]),
    "kto_tag": (GOOD | {"kto_tag": False}, [0]),
}


@pytest.mark.parametrize(("row", "weights"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_of_answers(tmp_path: Path, row: dict[str, Any], weights: list[float]) -> None:
    """Those of turns and of the row, multiplied; all of these fields are used."""
    (read,) = read_rows(write(tmp_path, lines(row))).rows
    assert [turn.weight for turn in read.turns if turn.role == "assistant"] == weights
    assert read.unused == ()


TEXT_PART = {"type": "text", "text": "a"}


THOUGHTS = {
    "reasoning_content": ANSWER | {"reasoning_content": "t"},
    "thinking": ANSWER | {"thinking": "t", "reasoning_content": None},
    "the same under two names": ANSWER | {"thinking": "t", "reasoning": "t"},
    "part": ANSWER | {"content": [{"type": "thinking", "thinking": "t"}, TEXT_PART]},
    "part of parts": ANSWER
    | {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "t"}]},
            *[{"type": "text", "text": "a"}],
        ]
    },
}


@pytest.mark.parametrize("answer", THOUGHTS.values(), ids=THOUGHTS)
def test_reasoning_is_no_part_of_the_answer(tmp_path: Path, answer: Message) -> None:
    """Under any of its names, or as a part of the content."""
    (read,) = read_rows(write(tmp_path, lines({"messages": [user("q"), answer]}))).rows
    assert (read.turns[-1].content, read.turns[-1].reasoning, read.unused) == ("a", "t", ())


@pytest.mark.parametrize("packed", [False, True])
def test_tools_are_read(tmp_path: Path, packed: bool) -> None:
    """As objects, or as their JSON; none at all is no tools."""
    tools = [{"type": "function", "function": {"name": "w"}}]
    rows = [GOOD | {"tools": json.dumps(value) if packed else value} for value in (tools, [])]
    used, unused = read_rows(write(tmp_path, lines(*rows))).rows
    assert (list(used.tools), unused.tools, used.unused) == (tools, (), ())


UNUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all used": (GOOD | {"context": "c", "input": "i", "system": "s", "history": [["1", "2"]]}, []),
    "nothing in it": (GOOD | {"tags": [], "meta": {}, "by": "", "id": None}, []),
    "false and 0": (GOOD | {"parallel_tool_calls": False, "id": 0}, ["'parallel_tool_calls'", "'id'"]),
    "second answer": (GOOD | {"output": "b"}, ["'output'"]),
    "second question": (GOOD | {"instruction": "i"}, ["'prompt'"]),
    "second spelling": (GOOD | {"PROMPT": "r"}, ["'PROMPT'"]),
    "second system": ({"system": "x", "messages": [SYSTEM, user("q"), ANSWER]}, ["'system'"]),
    "beside messages": ({"messages": [user("q"), ANSWER], "context": "c"}, ["'context'"]),
    "of turns": (
        {"messages": [user("q") | {"name": "n", "id": None}, ANSWER | {"name": "m"}]},
        ["'messages[].name' of user turns", "'messages[].name' of assistant turns"],
    ),
    "label of another kind": (GOOD | {"label": 0, "loss": 2.5}, ["'label'", "'loss'"]),
    "two reasonings": (
        {"messages": [user("q") | {"thinking": "t"}, ANSWER | {"thinking": "t", "reasoning": "r"}]},
        ["'messages[].thinking' of user turns", "'messages[].reasoning' of assistant turns"],
    ),
    "learnt question": (
        {"messages": [user("q") | {"train": True, "weight": 0}, ANSWER]},
        ["'messages[].train' of user turns"],
    ),
    "end": ({"messages": [user("q"), ANSWER, user("thanks")]}, ["turns after the last answer"]),
    "odd name": (GOOD | {"\ud83d": 1}, ["'\\ud83d'"]),
}


@pytest.mark.parametrize(("row", "unused"), UNUSED.values(), ids=UNUSED)
def test_what_no_rule_uses_is_named(tmp_path: Path, row: dict[str, Any], unused: list[str]) -> None:
    """Once a row, however many of its turns have it; what holds nothing is nothing to name."""
    (read,) = read_rows(write(tmp_path, lines(row))).rows
    assert list(read.unused) == unused
    "".join(read.unused).encode()  # can be printed
