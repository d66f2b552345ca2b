"""Rows → token ids → batches whose loss is on the answers only, in an order that one integer describes."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch

from fedmoe.data.chat import Encoder
from fedmoe.data.jsonl import Rows
from fedmoe.errors import DataError, StoppedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LABEL = -100


@dataclass(frozen=True, slots=True)
class Example:
    """One row as tokens; `input_ids[n_prompt:]`, never empty, are the labels."""

    input_ids: "array[int]"
    n_prompt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """What is trained on, and what is not.

    Args:
        examples: in the order of the file.
        dropped: reason → number of rows that were left out for it.
        cut: how many of the examples lost the end of their answer to `max_length`.
        max_length: in tokens, prompt and answer together.
    """

    examples: tuple[Example, ...]
    dropped: Mapping[str, int]
    cut: int
    max_length: int

    def summary(self) -> str:
        """One line, for example: 100 rows: 90 used (4 cut to max_length 512), 10 dropped (10 malformed)."""
        n_dropped = sum(self.dropped.values())
        cut = f" ({self.cut} cut to max_length {self.max_length})" if self.cut else ""
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(self.dropped).most_common())
        return (
            f"{len(self.examples) + n_dropped} rows: {len(self.examples)} used{cut}, "
            f"{n_dropped} dropped{reasons and f' ({reasons})'}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """`b` examples, padded on the right to the longest, `L`.

    Args:
        input_ids: (b, L) int64.
        attention_mask: (b, L) int64, 1 for tokens and 0 for padding.
        labels: (b, L) int64, -100 outside the answers; not shifted.
        n_tokens: how many labels count.
        first_label: the first column in which any row has a label; logits are needed from first_label - 1 on.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    n_tokens: int
    first_label: int


def make_examples(
    rows: Rows,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    *,
    on_bad_row: Literal["skip", "fail"] = "skip",
    stopped: Callable[[], bool] = lambda: False,
) -> Examples:
    """Tokenize every row. Too long an answer is cut, and then has no end of turn; a prompt is never cut.

    Raises:
        DataError: if no row is left to train on, or on_bad_row is "fail" and one cannot be used.
        StoppedError: if `stopped` returns true; it is asked every so often.
    """
    encoder = Encoder(tokenizer)
    examples: list[Example] = []
    dropped: Counter[str] = Counter({"malformed": len(rows.problems)} if rows.problems else {})
    cut = 0
    for row in rows.rows:
        if stopped():
            raise StoppedError("stopped while the rows were tokenized: nothing was trained yet")
        try:
            prompt, answer = encoder.encode(row)
            if len(prompt) >= max_length:
                raise DataError(f"with a prompt that fills max_length {max_length}")
        except DataError as error:
            if on_bad_row == "fail":
                raise DataError(f"{rows.path} line {row.line}: a row {error}") from error
            dropped[str(error)] += 1
            continue
        cut += len(prompt) + len(answer) > max_length
        ids = array("i", (prompt + answer)[:max_length])
        examples.append(Example(input_ids=ids, n_prompt=len(prompt)))
    made = Examples(examples=tuple(examples), dropped=dropped, cut=cut, max_length=max_length)
    if not examples:
        raise DataError(
            f"nothing to train on in {rows.path}: {made.summary()}; raise max_length or mend the file"
        )
    return made


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad on the right, because positions and the loss's shift then need no thought."""
    shape = len(examples), max(len(example.input_ids) for example in examples)
    input_ids = torch.full(shape, pad_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, NO_LABEL)
    for i, example in enumerate(examples):
        ids = torch.frombuffer(example.input_ids, dtype=torch.int32)
        input_ids[i, : len(ids)] = ids
        attention_mask[i, : len(ids)] = 1
        labels[i, example.n_prompt : len(ids)] = ids[example.n_prompt :]
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        n_tokens=sum(len(example.input_ids) - example.n_prompt for example in examples),
        first_label=min(example.n_prompt for example in examples),
    )


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Any id will do, since padding is masked: the pad token's, else the end of sequence's, else 0."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def indices(position: int, count: int, n_rows: int, seed: int) -> list[int]:
    """Rows number position … position+count-1 of an endless sequence that is shuffled anew in every epoch.

    Pure, so a place in the data is one integer, and a worker that resumes goes on exactly where it was.
    """
    return [_shuffled(n_rows, seed, k // n_rows)[k % n_rows] for k in range(position, position + count)]


@lru_cache(maxsize=2)
def _shuffled(n_rows: int, seed: int, epoch: int) -> "array[int]":
    # Hashed: torch uses only 32 bits of a seed, and with seed + epoch two seeds would share their orders.
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return array("q", torch.randperm(n_rows, generator=generator).tolist())
