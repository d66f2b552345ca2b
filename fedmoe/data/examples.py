"""Rows → token ids → batches whose loss is on the answers only, in an order that one integer describes."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedmoe.data.bad_rows import BadRows, Problem
from fedmoe.data.chat import Encoder
from fedmoe.data.jsonl import DataFile, read_row
from fedmoe.data.records import Record, records
from fedmoe.errors import DataError, RowError, StoppedError
from fedmoe.text import shown

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
        problems: the rows that were left out, in the order of the file.
        cut: how many of the examples lost the end of their answer to `max_length`.
        max_length: in tokens, prompt and answer together.
    """

    examples: tuple[Example, ...]
    problems: tuple[Problem, ...]
    cut: int
    max_length: int

    def summary(self) -> str:
        """One line, for example: 100 rows: 90 used (4 cut to max_length 512), 10 dropped (10 × its answer is empty)."""
        n_dropped = len(self.problems)
        cut = f" ({self.cut} cut to max_length {self.max_length})" if self.cut else ""
        kinds = Counter(problem.kind for problem in self.problems)
        reasons = "; ".join(f"{count} × {kind}" for kind, count in kinds.most_common())
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
    data: DataFile,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    bad_rows: BadRows,
    *,
    sample: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> Examples:
    """Tokenize every row. Too long an answer is cut, and then has no end of turn; a prompt is never cut.

    Args:
        data: the file.
        tokenizer: of the base model, with its chat template.
        max_length: in tokens, prompt and answer together.
        bad_rows: what is done with rows that cannot be used.
        sample: how many rows to look at, evenly spread; 0 for all.
        stopped: whether to stop; it is asked every so often.

    Raises:
        DataError: if no row is left to train on, or at the first bad row if `bad_rows` says so.
        StoppedError: if `stopped` returns true.
    """
    encoder = Encoder(tokenizer)
    examples: list[Example] = []
    problems: list[Problem] = []
    cut = 0
    for record in _sampled(data, sample):
        if stopped():
            raise StoppedError("stopped while the rows were tokenized: nothing was trained yet")
        made = _make(record, data.path, encoder, max_length)
        if isinstance(made, Problem):
            bad_rows.check(made)
            problems.append(made)
        else:
            examples.append(made[0])
            cut += made[1]
    bad_rows.report(data.path, problems)
    used = Examples(examples=tuple(examples), problems=tuple(problems), cut=cut, max_length=max_length)
    if not examples:
        raise DataError(
            f"nothing to train on in {shown(data.path)}: {used.summary()}; raise max_length or mend the file"
        )
    return used


def _sampled(data: DataFile, count: int) -> Iterator[Record]:
    if not 0 < count < data.n_rows:
        return records(data.path)
    wanted = {i * data.n_rows // count for i in range(count)}
    return (record for record in records(data.path) if record.number in wanted)


def _make(record: Record, path: Path, encoder: Encoder, max_length: int) -> tuple[Example, bool] | Problem:
    """The row as an example, and whether its answer was cut; or why there is none."""
    row = read_row(path, record)
    if isinstance(row, Problem):
        return row
    try:
        prompt, answer = encoder.encode(row)
        if len(prompt) >= max_length:
            raise RowError(f"its prompt fills max_length {max_length}")
    except RowError as error:
        return Problem.of(error, path, record.number, record.line)
    ids = array("i", (prompt + answer)[:max_length])
    return Example(input_ids=ids, n_prompt=len(prompt)), len(prompt) + len(answer) > max_length


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
