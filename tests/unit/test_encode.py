"""One row as examples: which of its answers are learnt, with what weight, in how many examples."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedmoe.data.bad_rows import Problem
from fedmoe.data.chat import Encoder
from fedmoe.data.encode import Encoded, Example, encode_row
from fedmoe.data.records import Record
from fedmoe.data.template import ChatTemplate, Tools, Written
from fedmoe.data.turns import Turn
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LEFT_OUT = "one of its answers is not learnt: "
Labels = list[tuple[str, float]]


def turns(*texts: str, **last: Any) -> dict[str, Any]:
    """Questions and answers in turn; `last` are fields of the last one."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    messages[-1] |= last
    return {"messages": messages}


def encode(row: object, **options: Any) -> Encoded | Problem:
    record = Record(number=0, line=7, text=json.dumps(row))
    settings = {"max_length": 512, "learn": "all"} | options
    return encode_row(record, Path("rows.jsonl"), Encoder(TOKENIZER), **settings)


def encoded(row: object, **options: Any) -> Encoded:
    made = encode(row, **options)
    assert isinstance(made, Encoded), made
    return made


def labels(example: Example) -> Labels:
    return [
        (TOKENIZER.decode(list(example.input_ids[start:stop])), weight)
        for start, stop, weight in example.answers
    ]


def test_weight_0_is_never_learnt() -> None:
    """It stays in the prompt of what follows; a row of nothing else gives no example, and is no bad row."""
    made = encoded(turns("q1", "GOOD", "q2", "BAD", weight=0))
    assert [labels(example) for example in made.examples] == [[("GOOD<|im_end|>", 1.0)]]
    assert made.weight_0 == 1
    row = turns("q1", "BAD", "q2", "GOOD")
    row["messages"][1]["weight"] = 0
    made = encoded(row)
    assert [labels(example) for example in made.examples] == [[("GOOD<|im_end|>", 1.0)]]
    assert "BAD<|im_end|>" in TOKENIZER.decode(list(made.examples[0].input_ids))
    made = encoded({"prompt": "q", "completion": "BAD", "label": False})
    assert (made.examples, made.weight_0, made.left_out) == ((), 1, ())


@pytest.mark.parametrize("weight", [0.25, 1])
def test_a_weight_goes_with_its_answer(weight: float) -> None:
    """Others of the conversation keep theirs."""
    (example,) = encoded(turns("q1", "a", "q2", "b", weight=weight)).examples
    assert labels(example) == [("a<|im_end|>", 1.0), ("b<|im_end|>", weight)]


THREE = turns("q1", "FIRST", "q2", "SECOND", "q3", "THIRD")
THREE["messages"].insert(0, {"role": "system", "content": "s"})


def test_all_answers_are_learnt_in_one_pass() -> None:
    """Where the template leaves earlier turns as they are: one example, whose labels are the answers alone."""
    (example,) = encoded(THREE).examples
    assert labels(example) == [(f"{answer}<|im_end|>", 1.0) for answer in ("FIRST", "SECOND", "THIRD")]
    whole = TOKENIZER.apply_chat_template(THREE["messages"], return_dict=False)
    assert list(example.input_ids) == whole[:-1]  # but for the line feed after the last turn


def test_only_the_last_is_learnt_if_so_wanted() -> None:
    """As one example of the same tokens."""
    (example,) = encoded(THREE, learn="last").examples
    assert labels(example) == [("THIRD<|im_end|>", 1.0)]
    assert example.input_ids == encoded(THREE).examples[0].input_ids


DROPS_EARLIER_REASONING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMS = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")


def test_an_example_an_answer_where_the_template_changes_earlier_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Qwen3's, which writes reasoning into the last turn only: each is learnt as the model will write it."""
    monkeypatch.setattr(TOKENIZER, "chat_template", DROPS_EARLIER_REASONING)
    examples = encoded(THREE).examples
    answers = ("FIRST", "SECOND", "THIRD")
    assert [labels(example) for example in examples] == [
        [(f"<think>\n\n</think>\n\n{answer}<|im_end|>", 1.0)] for answer in answers
    ]
    for place, example in zip((2, 4, 6), examples, strict=True):
        asked = TOKENIZER.apply_chat_template(
            THREE["messages"][:place], add_generation_prompt=True, return_dict=False
        )
        assert list(example.input_ids[: example.answers[0].start]) == asked


def test_answers_that_the_template_alters_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that it would trim gets an example of its own; those after it share one again."""
    monkeypatch.setattr(TOKENIZER, "chat_template", TRIMS)
    examples = encoded(turns("q1", " a", "q2", "b", "q3", "c")).examples
    assert [[text for text, _ in labels(example)] for example in examples] == [
        [" a<|im_end|>"],
        ["b<|im_end|>", "c<|im_end|>"],
    ]


def test_answers_beyond_max_length_are_left_out_and_said() -> None:
    """What fits is learnt, cut at the limit; what does not is named by its line."""
    whole = encoded(THREE).examples[0]
    second = whole.answers[1]
    made = encoded(THREE, max_length=second.start + 2)
    (example,) = made.examples
    assert labels(example) == [("FIRST<|im_end|>", 1.0), ("SE", 1.0)]
    assert (len(example.input_ids), made.truncated) == (second.start + 2, 1)
    assert [(p.line, p.reason) for p in made.left_out] == [
        (7, f"{LEFT_OUT}its prompt leaves no room for the answer (max_length {second.start + 2} tokens)")
    ]


@pytest.mark.parametrize("thought", ["", "<think>t</think>"])
def test_a_long_conversation_is_not_rendered_for_each_of_its_answers(
    monkeypatch: pytest.MonkeyPatch, thought: str
) -> None:
    """Only until max_length is full, unless prompts may get shorter again; all are left out by name, though."""
    written: list[int] = []
    write = ChatTemplate.write

    def counted(self: ChatTemplate, turns: Sequence[Turn], tools: Tools = ()) -> Written:
        written.append(len(turns))
        return write(self, turns, tools)

    monkeypatch.setattr(ChatTemplate, "write", counted)
    made = encoded(turns(*["some words"] * 19, thought + "a"), max_length=100)
    assert len(written) == (10 if thought else 3)
    assert len(made.examples[0].answers) + len(made.left_out) == 10


def test_an_empty_answer_costs_no_other() -> None:
    """It is named; with nothing else to learn, the row is a bad one."""
    made = encoded(turns("q1", "", "q2", "b"))
    assert [labels(example) for example in made.examples] == [[("b<|im_end|>", 1.0)]]
    assert [p.reason for p in made.left_out] == [f"{LEFT_OUT}its answer is empty"]
    problem = encode(turns("q1", "", "q2", " "))
    assert isinstance(problem, Problem)
    assert problem.reason == "its answer is empty"


def test_an_answer_to_nothing_is_left_out() -> None:
    """A greeting before the first question is part of what follows, not learnt."""
    row = {"messages": [{"role": "assistant", "content": "hello"}, *turns("q", "a")["messages"]]}
    made = encoded(row)
    assert [labels(example) for example in made.examples] == [[("a<|im_end|>", 1.0)]]
    assert [p.reason for p in made.left_out] == [f"{LEFT_OUT}it has nothing before its answer"]


def test_a_row_is_left_out_whole_if_the_template_drops_a_part_of_it() -> None:
    """Also if an answer before that part could be learnt; the line is named."""
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
    problem = encode(turns("weather?", "sunny") | {"tools": tools, "parallel_tool_calls": False})
    assert isinstance(problem, Problem)
    assert str(problem) == "rows.jsonl line 7: the chat template leaves its tools out of the prompt"
    problem = encode(turns("2+2?", "4", "3+3?", "6", reasoning_content="three and three"))
    assert isinstance(problem, Problem)
    assert str(problem) == "rows.jsonl line 7: the chat template leaves its reasoning out"


def test_what_a_tool_returned_is_in_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """ShareGPT's roles, on a template that writes such turns, and on one that leaves them out."""
    said = [
        ("human", "weather in Rome?"),
        ("gpt", "<tool_call>w</tool_call>"),
        ("tool", "TEMP=17"),
        ("gpt", "17."),
    ]
    row = {"conversations": [{"from": role, "value": text} for role, text in said]}
    (example,) = encoded(row).examples
    assert [text for text, _ in labels(example)] == ["<tool_call>w</tool_call><|im_end|>", "17.<|im_end|>"]
    assert "<|im_start|>tool\nTEMP=17<|im_end|>" in TOKENIZER.decode(list(example.input_ids))
    without = CHAT_TEMPLATE.replace("in messages %}", "in messages if message['role'] != 'tool' %}")
    monkeypatch.setattr(TOKENIZER, "chat_template", without)
    problem = encode(row)
    assert isinstance(problem, Problem)
    assert problem.reason == "the chat template drops its tool turn"
