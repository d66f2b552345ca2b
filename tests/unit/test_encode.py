"""One row as examples: which of its answers are learnt, with what weight, in how many examples."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedmoe.data.bad_rows import Problem
from fedmoe.data.chat import Encoder
from fedmoe.data.encode import Encoded, Example, encode_row
from fedmoe.data.records import Record
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
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
