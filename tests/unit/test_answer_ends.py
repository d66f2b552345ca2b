"""fedmoe.data.template.end_ids: where the trained answers of each family of templates end."""

import pytest

from fedmoe.data.template import end_ids
from tests.tiny import END, tiny_tokenizer
from tests.unit.test_chat import GEMMA, HARMONY, LINES, MISTRAL, PLAIN, QWEN35, tokenizer


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (GEMMA, ["<end_of_turn>"]),
        (MISTRAL, ["<eos>"]),
        (QWEN35, ["<|im_end|>"]),
        (HARMONY, ["<return>"]),  # <end> ends the reasoning, in the middle of an answer
        (PLAIN, ["<eos>"]),
    ],
)
def test_an_answer_ends_as_it_was_trained(template: str, ends: list[str]) -> None:
    tokens = tokenizer(template)
    assert [tokens.decode(i) for i in end_ids(tokens)] == ends


def test_only_a_control_token_ends_an_answer() -> None:
    """Not the last letter of a text; without a template, or with one that refuses the roles, nothing does."""
    assert end_ids(tokenizer(LINES, eos=None)) == set()
    assert end_ids(tokenizer("{{ raise_exception('no') }}")) == set()
    tokens = tiny_tokenizer()
    assert end_ids(tokens) == {tokens.convert_tokens_to_ids(END)}
    tokens.chat_template = None
    assert end_ids(tokens) == set()
