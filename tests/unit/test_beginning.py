"""The first tokens of a long text are those of the whole, and cost no more than they must."""

import json
from pathlib import Path
from random import Random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from fedmoe.data import beginning
from fedmoe.data.bad_rows import Problem
from fedmoe.data.beginning import first_tokens
from fedmoe.data.chat import Encoder
from fedmoe.data.encode import Encoded, encode_row
from fedmoe.data.records import Record
from tests.tiny import tiny_tokenizer

WORDS = [
    "select",
    "from",
    "where",
    "a",
    "b_1",
    "=",
    "'x y'",
    "\n",
    "  ",
    "été",
    "日本語",
    "1234",
    "<|im_end|>",
    "),(",
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """Merges of up to some letters, words split as GPT-2 and its kin do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [" ".join(WORDS), "abab" * 9, "aaaa" * 9]
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text * 20, trainer)
    tokenizer.add_special_tokens(["<|im_end|>"])
    return tokenizer


@pytest.mark.parametrize("between", [" ", ""])
def test_they_are_those_of_the_whole_text(
    bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch, between: str
) -> None:
    """Of words, and of one word without an end, where a cut is inside it."""
    monkeypatch.setattr(beginning, "MIN_CHARS", 8)
    random = Random(0)
    for n in range(1, 400, 3):
        text = between.join(random.choices(WORDS if n % 2 else ["a", "b"], k=n * 5))

        def tokenize(text: str) -> list[int]:
            return list(bpe.encode(text).ids)

        whole = tokenize(text)
        for enough in (1, n % 50 + 1, len(whole), len(whole) + 1):
            first = first_tokens(tokenize, text, enough)
            assert first[:enough] == whole[:enough]
            assert (len(first) > enough) is (len(whole) > enough)


def test_little_of_a_long_text_is_tokenized() -> None:
    """Some times more than is needed, however long it is and however many characters its tokens have."""
    for text, chars_a_token in (("a " * 10**6, 2), ("x" * 10**6, 1), (" " * 10**6, 100)):
        seen: list[int] = []

        def tokenize(part: str, width: int = chars_a_token, seen: list[int] = seen) -> list[int]:
            seen.append(len(part))
            return [0] * (len(part) // width)

        assert len(first_tokens(tokenize, text, 512)) >= 512 + beginning.TAIL_TOKENS
        assert max(seen) <= 5 * max(4096, chars_a_token * (512 + beginning.TAIL_TOKENS))


@pytest.mark.parametrize(("question", "answer"), [("q", "yes and no. " * 300_000), ("what? " * 500_000, "a")])
def test_a_row_of_three_megabytes_is_truncated_before_it_is_tokenized(
    monkeypatch: pytest.MonkeyPatch, question: str, answer: str
) -> None:
    """Its answer is cut as ever, and its prompt skips it; neither is tokenized whole."""
    sizes: list[int] = []
    ids = Encoder.token_ids

    def counted(self: Encoder, text: str) -> list[int]:
        sizes.append(len(text))
        return ids(self, text)

    monkeypatch.setattr(Encoder, "token_ids", counted)
    text = json.dumps({"prompt": question, "completion": answer})
    encoder = Encoder(tiny_tokenizer())
    made = encode_row(Record(0, 1, text), Path("rows.jsonl"), encoder, max_length=64, learn="all")
    if question == "q":
        assert isinstance(made, Encoded)
        ((example,), cut) = made.examples, made.truncated
        assert (len(example.input_ids), cut) == (64, 1)
        shown = tiny_tokenizer().decode(list(example.input_ids))
        assert shown.endswith(
            "<|im_start|>assistant\n" + answer[: example.answers[0].stop - example.answers[0].start]
        )
    else:
        assert isinstance(made, Problem)
        assert made.kind == "its prompt leaves no room for the answer (max_length 64 tokens)"
    assert max(sizes) < 20_000
