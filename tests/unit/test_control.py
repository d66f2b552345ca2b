"""Rows whose texts hold control tokens: unwrapped, bared of them, or left out; never learnt as they are."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fedmoe.data.bad_rows import BadRows
from fedmoe.data.chat import Encoder
from fedmoe.data.control import ENDS_TAKEN_OFF, MAX_EARLIER_ANSWERS, UNWRAPPED
from fedmoe.data.examples import make_examples
from fedmoe.data.jsonl import open_data
from fedmoe.data.template import TEMPLATE_ERRORS
from fedmoe.data.turns import Turn
from fedmoe.errors import RowError
from tests.errors import raises
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

BOS, EOS = "<bos>", "<eos>"
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<turn>' + m.role + '\n' + m.content | trim + '<turn_end>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}"
    "{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ '### ' + m.role + '\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}"
    + CHAT_TEMPLATE
)
TEMPLATES = {
    "ChatML": CHAT_TEMPLATE,
    "Gemma": GEMMA,
    "Mistral": MISTRAL,
    "default system": DEFAULT_SYSTEM,
    "no control tokens": PLAIN,
}


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer, bos_token=BOS, eos_token=EOS
    )
    made.add_tokens(["<turn>", "<turn_end>"], special_tokens=True)
    made.chat_template = template
    return made


def said(*texts: str) -> list[Turn]:
    return [Turn(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]


def prepare(turns: list[Turn], template: str = CHAT_TEMPLATE) -> tuple[list[Turn], list[str]]:
    prepared = Encoder(tokenizer(template)).prepare(turns)
    return list(prepared.turns), list(prepared.notes)


def test_rows_that_were_templated_already(tmp_path: Path) -> None:
    """Unwrapped, bared of the end of turn, or left out by line; each is said once, with a count."""
    path = tmp_path / "rows.jsonl"
    rows = [
        ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "a<|im_end|>"),
        ("q", "a<|im_end|>\n"),
        ("q", "a<|endoftext|>"),
        ("what does <|im_end|> mean?", "<|im_end|> ends a turn, e.g. hi<|im_end|>"),
        ("q", "<|im_end|>"),
        ("q", "a</s>"),
    ]
    path.write_text("\n".join(json.dumps({"prompt": prompt, "completion": a}) for prompt, a in rows))
    bad_rows = BadRows(report=print)
    made = make_examples(open_data(path, bad_rows), tiny_tokenizer(), 512, bad_rows)
    texts = [tiny_tokenizer().decode(list(example.input_ids)) for example in made.examples]
    whole = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>"
    assert texts == [whole, whole, whole, whole.replace("a<", "a</s><")]
    assert [(problem.line, problem.reason) for problem in made.problems] == [
        (4, "it holds a control token: '<|im_end|>' in its user turn would begin or end a turn, remove it"),
        (5, "its answer is empty"),
    ]
    assert made.summary() == (
        "6 rows: 4 used, 2 dropped (1 × it holds a control token; 1 × its answer is empty); "
        f"{ENDS_TAKEN_OFF} (3 rows); {UNWRAPPED} (1 rows); "
        "'</s>' is trained on as plain text, because it is no control token of this model (1 rows)"
    )


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("n_answers", [0, 2, MAX_EARLIER_ANSWERS])
def test_what_the_template_wrote_is_taken_apart(template: str, system: bool, n_answers: int) -> None:
    """Into the turns that it was written of, so that all answers can be learnt."""
    turns = said(*(f"text {i}\n two" for i in range(2 * n_answers + 2)))
    if system:
        turns.insert(0, Turn(role="system", content="s"))
    messages: Any = [{"role": turn.role, "content": turn.content} for turn in turns[:-1]]
    try:
        text = tokenizer(template).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TEMPLATE_ERRORS:
        return
    answer = turns[-1].content
    for prompt in (text, text.rstrip(), text.removeprefix("<bos>")):
        assert prepare(said(prompt, answer + "<eos>"), template) == (turns, [ENDS_TAKEN_OFF, UNWRAPPED])


@pytest.mark.parametrize("end", ["<turn_end>", "<turn_end>\n", "<eos>", "<eos> <turn_end>"])
def test_ends_are_taken_off_all_answers(end: str) -> None:
    """Of earlier ones, too; the template writes them."""
    assert prepare(said("q", "a" + end, "r", "b"), GEMMA) == (said("q", "a", "r", "b"), [ENDS_TAKEN_OFF])


MIDDLE = {
    "question": (said("what is <turn>?", "a"), "'<turn>' in its user turn"),
    "question that ends in it": (said("what is <turn_end>", "a"), "'<turn_end>' in its user turn"),
    "answer": (said("q", "a<turn_end>\n<turn>user\nr"), "'<turn_end>' in its assistant turn"),
    "earlier answer": (said("q", "<turn>a", "r", "b"), "'<turn>' in its assistant turn"),
    "end of sequence": (said("q<eos>", "a"), "'<eos>' in its user turn"),
    "system": ([Turn(role="system", content="<bos>"), *said("q", "a")], "'<bos>' in its system turn"),
    "reasoning": (
        [*said("q"), Turn(role="assistant", content="a", reasoning="<turn>")],
        "'<turn>' in its assistant turn",
    ),
    "another conversation before it": (
        said("<bos><turn>user\nq<turn_end>\n<turn>narrator\nx<turn_end>\n<turn>assistant\n", "a"),
        "'<bos>' in its user turn",
    ),
}


@pytest.mark.parametrize(("turns", "reason"), MIDDLE.values(), ids=MIDDLE)
def test_control_tokens_in_the_middle_of_a_text_are_refused(turns: list[Turn], reason: str) -> None:
    """They would end an answer, or begin a turn, where the row has none."""
    with pytest.raises(RowError, match=f"it holds a control token: {reason}"):
        prepare(turns, GEMMA)
    with raises(RowError, about="control_token"):
        Encoder(tokenizer(GEMMA)).prepare(said("q", "a"), ({"description": "<turn>"},))


@pytest.mark.parametrize("text", ["<think>b</think>a", "<|im_start|>", "turn", "<turn", "<eos"])
def test_other_text_is_none_of_its_business(text: str) -> None:
    """Reasoning, what this template does not write, and what only looks alike."""
    turns, _ = prepare(said(text, text), GEMMA)
    assert turns == said(text, text)
