"""Rows as examples, batches and an order."""

import json
from array import array
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedmoe.data.bad_rows import BadRows
from fedmoe.data.encode import Answer, Example
from fedmoe.data.examples import NO_LABEL, collate, indices, make_examples, padding_id
from fedmoe.data.flat import FlatExamples
from fedmoe.data.jsonl import DataFile, open_data
from fedmoe.data.progress import Progress
from fedmoe.errors import DataError, StoppedError
from tests.tiny import END, PAD, save_tiny_model, tiny_model, tiny_tokenizer

PROMPT_TOKENS = len("Suser\nqE\nSassistant\n")  # S and E are <|im_start|> and <|im_end|>, one token each


class MakeRows(Protocol):
    def __call__(self, *answers: str, question: str = "q", bad: int = 0) -> DataFile: ...


BAD_ROWS = BadRows(report=print)


@pytest.fixture
def rows(tmp_path: Path) -> MakeRows:
    """Makes a data file of good rows, with bad ones behind them."""

    def make(*answers: str, question: str = "q", bad: int = 0) -> DataFile:
        path = tmp_path / "rows.jsonl"
        good = [json.dumps({"prompt": question, "completion": answer}) for answer in answers]
        path.write_text("\n".join([*good, *["{"] * bad]))
        return open_data(path, BAD_ROWS)

    return make


def test_labels_are_the_answer_and_its_end(rows: MakeRows) -> None:
    """From the prompt's end to the example's, by the token."""
    tokenizer = tiny_tokenizer()
    (example,) = make_examples(rows("abc"), tokenizer, 512, BAD_ROWS).examples
    assert example.answers == (Answer(PROMPT_TOKENS, PROMPT_TOKENS + 4, 1.0),)
    assert tokenizer.decode(list(example.input_ids[example.answers[0].start :])) == "abc" + END


def test_too_long_an_answer_is_cut_and_has_no_end(rows: MakeRows) -> None:
    """At the limit it is whole; one below it the end of turn is gone; the cut is counted."""
    tokenizer = tiny_tokenizer()
    for room, text, cut in ((4, "abc" + END, 0), (3, "abc", 1), (1, "a", 1)):
        made = make_examples(rows("abc"), tokenizer, PROMPT_TOKENS + room, BAD_ROWS)
        (example,) = made.examples
        assert tokenizer.decode(list(example.input_ids[example.answers[0].start :])) == text
        assert made.truncated == cut
    assert made.summary() == "1 rows: 1 used (1 truncated to max_length 21), 0 dropped"


def test_a_prompt_without_room_for_an_answer_drops_the_row(rows: MakeRows) -> None:
    """A row without labels would give a loss of 0/0."""
    reason = (
        r"1 rows: 0 used, 1 dropped \(1 × its prompt leaves no room for the answer \(max_length 20 tokens\)\)"
    )
    with pytest.raises(
        DataError,
        match=rf"nothing to train on in .*rows.jsonl: {reason}; raise max_length \(fedmoe expert set\), or",
    ):
        make_examples(rows("abc"), tiny_tokenizer(), PROMPT_TOKENS, BAD_ROWS)


def test_rows_of_weight_0_are_nothing_to_train_on(tmp_path: Path) -> None:
    """They are no bad rows, so even --on-bad-row fail takes them; but a file of them alone gives no example."""
    path = tmp_path / "rows.jsonl"
    undesired = json.dumps({"prompt": "q", "completion": "BAD", "label": False})
    strict = BadRows(report=print, fail=True)
    path.write_text(undesired)
    with pytest.raises(
        DataError,
        match=r"1 rows: 0 used, 1 of weight 0, 0 dropped; 1 answers have weight 0 and are not learnt; correct the",
    ):
        make_examples(open_data(path, strict), tiny_tokenizer(), 512, strict)
    path.write_text(undesired + '\n{"prompt": "q", "completion": "GOOD", "label": true}')
    made = make_examples(open_data(path, strict), tiny_tokenizer(), 512, strict)
    assert made.summary().startswith("2 rows: 1 used, 1 of weight 0, 0 dropped; ")
    assert len(made.examples) == 1


def test_every_row_is_accounted_for_with_its_reason(rows: MakeRows) -> None:
    """Used and dropped together are the rows of the file, bad ones included."""
    made = make_examples(rows("a", "", "b", " \n", "", bad=2), tiny_tokenizer(), 512, BAD_ROWS)
    assert [problem.line for problem in made.problems] == [2, 4, 5, 6, 7]
    assert made.summary() == "7 rows: 2 used, 5 dropped (3 × its answer is empty; 2 × it is not JSON)"


def test_tokenizing_can_be_stopped(rows: MakeRows) -> None:
    """Told to stop after some rows, it does not go on to the last."""
    asked = iter([False, False, True])
    with pytest.raises(StoppedError):
        make_examples(rows(*"abcdef"), tiny_tokenizer(), 512, BAD_ROWS, stopped=lambda: next(asked))


def test_what_no_rule_uses_is_counted_in_the_summary(tmp_path: Path) -> None:
    """The most frequent fields by name, and how many there are besides."""
    path = tmp_path / "rows.jsonl"
    good = {"prompt": "q", "completion": "a"}
    rows = [good | {f"field {i}": 1 for i in range(n)} for n in (10, 9, 8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    summary = make_examples(open_data(path, BAD_ROWS), tiny_tokenizer(), 512, BAD_ROWS).summary()
    assert summary.startswith(
        "3 rows: 3 used, 0 dropped; ignored parts of rows: 'field 0' (3 rows), 'field 1' (3 rows), "
    )
    assert summary.endswith("'field 7' (3 rows) and 2 more")


def test_a_batch_is_padded_on_the_right_and_labelled_on_the_answers(rows: MakeRows) -> None:
    """Shapes, types and every field, against the tokens."""
    tokenizer = tiny_tokenizer()
    short, long = make_examples(rows("a", "bcd"), tokenizer, 512, BAD_ROWS).examples
    batch = collate([short, long], padding_id(tokenizer))
    width = PROMPT_TOKENS + 4
    assert [t.shape for t in (batch.input_ids, batch.attention_mask, batch.labels)] == [(2, width)] * 3
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}
    assert batch.input_ids[1].tolist() == list(long.input_ids)
    assert tokenizer.decode(batch.input_ids[0][-4:]) == "a" + END + PAD + PAD
    assert batch.attention_mask[0].tolist() == [1] * (width - 2) + [0, 0]
    assert batch.labels[0].tolist() == [NO_LABEL] * PROMPT_TOKENS + [
        *short.input_ids[-2:],
        NO_LABEL,
        NO_LABEL,
    ]
    assert batch.n_tokens == 6 == (batch.labels != NO_LABEL).sum()
    assert batch.weight == 6
    assert torch.equal(batch.weights, (batch.labels != NO_LABEL).float())
    assert batch.first_label == PROMPT_TOKENS


def test_first_label_is_the_smallest_of_the_batch(rows: MakeRows) -> None:
    """With prompts of different length."""
    tokenizer = tiny_tokenizer()
    examples = [
        make_examples(rows("a", question=question), tokenizer, 512, BAD_ROWS).examples[0]
        for question in ("a long question", "q")
    ]
    assert collate(examples, 0).first_label == PROMPT_TOKENS < examples[0].answers[0].start


def test_a_model_takes_the_batch_and_the_loss_is_over_the_labels(rows: MakeRows) -> None:
    """Its own loss is the mean over n_tokens of logits from first_label - 1 on; finite with one label too."""
    tokenizer = tiny_tokenizer()
    examples = make_examples(rows("a", "bcd" * 30), tokenizer, PROMPT_TOKENS + 9, BAD_ROWS).examples
    batch = collate(
        [*examples, *make_examples(rows("x"), tokenizer, PROMPT_TOKENS + 1, BAD_ROWS).examples],
        padding_id(tokenizer),
    )
    out = tiny_model()(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    logits = out.logits[:, batch.first_label - 1 : -1]
    total = F.cross_entropy(
        logits.flatten(0, 1),
        batch.labels[:, batch.first_label :].flatten(),
        ignore_index=NO_LABEL,
        reduction="sum",
    )
    assert torch.isfinite(out.loss)
    torch.testing.assert_close(out.loss, total / batch.n_tokens)


def test_padding_takes_the_end_of_sequence_or_nothing() -> None:
    """Many base models have no pad token, and 0 is a token id too."""
    core = tiny_tokenizer().backend_tokenizer
    assert padding_id(tiny_tokenizer()) == tiny_tokenizer().pad_token_id
    with_end = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END)
    assert padding_id(with_end) == with_end.eos_token_id
    assert padding_id(PreTrainedTokenizerFast(tokenizer_object=core)) == 0
    first = core.id_to_token(0)
    assert padding_id(PreTrainedTokenizerFast(tokenizer_object=core, pad_token=first, eos_token=END)) == 0


def test_a_saved_tokenizer_makes_the_same_examples(rows: MakeRows, tmp_path: Path) -> None:
    """The tiny model's directory gives by AutoTokenizer what the tests build in code."""
    loaded = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path))
    data = rows("abc", "  d\n", "日本")
    assert make_examples(data, loaded, 30, BAD_ROWS) == make_examples(data, tiny_tokenizer(), 30, BAD_ROWS)


@given(
    st.lists(
        st.builds(
            Example,
            st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5).map(lambda ids: array("i", ids)),
            st.lists(
                st.builds(Answer, st.integers(0, 9), st.integers(0, 9), st.floats(0, 1)),
                min_size=1,
                max_size=3,
            ).map(tuple),
            st.integers(0, 2**40),
        ),
        max_size=5,
    )
)
def test_flat_examples_are_those_that_were_put_in(examples: list[Example]) -> None:
    """One by one, as a slice, from the end, and none beyond it."""
    flat = FlatExamples()
    flat.extend(examples)
    assert list(flat) == examples == flat[:] == [flat[i - len(examples)] for i in range(len(examples))]
    assert flat[1:] == examples[1:]
    with pytest.raises(IndexError):
        flat[len(examples)]


def test_an_example_knows_its_line(tmp_path: Path) -> None:
    """Blank lines before it move it, but make no other data of it: a position in the data means the same."""
    row = json.dumps({"prompt": "q", "completion": "a"}) + "\n"
    made = []
    for number, text in enumerate((row + row, f"\n\n{row}\n{row}")):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(text)
        made.append(make_examples(open_data(path, BAD_ROWS), tiny_tokenizer(), 512, BAD_ROWS))
    assert [[example.line for example in some.examples] for some in made] == [[1, 2], [3, 5]]
    assert made[0].digest() == made[1].digest()


def test_progress_is_told_every_five_seconds() -> None:
    """With the time that is left, as long as anybody knows how many there are."""
    at = iter([100.0, 101.0, 105.0, 109.9, 110.0, 120.0])  # the first counts
    said: list[str] = []
    progress = Progress(said.append, "tokenizing rows.jsonl", 3000, clock=lambda: next(at))
    for done in (0, 100, 1000, 1999, 2000, 3500):
        progress.at(done)
    assert said == [
        "tokenizing rows.jsonl: 1,000 rows of about 3,000, about 10 s left",
        "tokenizing rows.jsonl: 2,000 rows of about 3,000, about 5 s left",
        "tokenizing rows.jsonl: 3,500 rows",
    ]


@settings(max_examples=50)
@given(
    position=st.integers(0, 10**12), first=st.integers(0, 40), second=st.integers(0, 40), n=st.integers(1, 30)
)
def test_the_order_is_one_endless_sequence(position: int, first: int, second: int, n: int) -> None:
    """Read in any portions, from any place, it is the same."""
    together = indices(position, first + second, n, seed=7)
    assert together == indices(position, first, n, seed=7) + indices(position + first, second, n, seed=7)


def test_every_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    """And every seed too: epoch 1 of seed 0 is not epoch 0 of seed 1."""
    orders = [indices(epoch * 50, 50, 50, seed) for seed in range(5) for epoch in range(5)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 25


def test_the_digest_is_of_the_examples(rows: MakeRows, tmp_path: Path) -> None:
    """Whatever gives other ones gives another: file, template, `learn`, max_length, a weight; not a comment."""
    path = tmp_path / "turns.jsonl"

    def digest(template: str = "", weight: float = 1, **options: Any) -> str:
        turns = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "abc")]
        messages = [{"role": role, "content": content} for role, content in turns]
        messages[-1]["weight"] = weight
        path.write_text(json.dumps({"messages": messages, "comment": str(options)}))
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template += template
        data = open_data(path, BAD_ROWS)
        return make_examples(data, tokenizer, options.pop("max_length", 512), BAD_ROWS, **options).digest()

    assert digest() == digest(learn="all", max_length=500)
    others = [digest(learn="last"), digest(max_length=40), digest(weight=0.5), digest("{{ '\n' }}")]
    others.append(make_examples(rows("b"), tiny_tokenizer(), 512, BAD_ROWS).digest())
    assert len({digest(), *others}) == 6
