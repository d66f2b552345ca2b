"""Examples of rows, and batches of them; a single integer is the position in their shuffled order."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedmoe.data.bad_rows import BadRows, Problem
from fedmoe.data.encode import Encoded, Example, Learn
from fedmoe.data.flat import FlatExamples
from fedmoe.data.jsonl import DataFile
from fedmoe.data.parallel import Job, encode_rows, n_processes
from fedmoe.data.progress import Progress
from fedmoe.data.records import records
from fedmoe.errors import DataError
from fedmoe.util.text import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LABEL = -100
MAX_NAMED = 8
MANY_ROWS = 5000  # encoding more rows may take seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """The examples of a data file, and counts of what is left out.

    Args:
        examples: in the order of the file; a conversation may give more than one.
        n_rows: number of rows that were read.
        problems: the rows that were left out, in the order of the file.
        left_out: the answers that were left out of rows that are used.
        weight_0: number of answers with weight 0, which are not learnt; of_weight_0: number of rows with such only.
        truncated: number of examples that were truncated to `max_length`.
        max_length: maximum tokens of prompt and answer together.
        unused: parts of rows that no rule uses, such as a field's name → number of rows.
        notes: what was changed or found in the texts of rows → number of rows.
    """

    examples: FlatExamples
    n_rows: int
    problems: tuple[Problem, ...]
    left_out: tuple[Problem, ...]
    weight_0: int
    of_weight_0: int
    truncated: int
    max_length: int
    unused: Mapping[str, int]
    notes: Mapping[str, int]

    def digest(self) -> str:
        """The first 16 hex digits of a SHA-256 of the examples; a position is valid only for the same digest.

        Any change of the examples changes it, whether by the file, the tokenizer, the chat template or a setting.
        """
        return self.examples.digest()[:16]

    def report(self, path: Path, bad_rows: BadRows) -> None:
        """Report the rows and answers that were left out.

        Raises:
            DataError: if bad rows are fatal.
        """
        out = sorted([*self.problems, *self.left_out], key=lambda problem: problem.number)
        for problem in out:
            bad_rows.check(problem)
        bad_rows.report(path, out)

    def summary(self) -> str:
        """One line, such as: 100 rows: 90 used (4 truncated to max_length 512), 10 dropped (10 × answer is empty)."""
        n_dropped = len(self.problems)
        truncated = f" ({self.truncated} truncated to max_length {self.max_length})" if self.truncated else ""
        n_used = self.n_rows - n_dropped - self.of_weight_0
        of_weight_0 = f", {self.of_weight_0} of weight 0" if self.of_weight_0 else ""
        dropped = f"{n_dropped} dropped{_kinds(self.problems)}"
        parts = [f"{self.n_rows} rows: {n_used} used{truncated}{of_weight_0}, {dropped}"]
        if self.left_out:
            parts.append(f"{len(self.left_out)} answers of used rows are left out{_kinds(self.left_out)}")
        if self.weight_0:
            parts.append(f"{self.weight_0} answers have weight 0 and are not learnt")
        if self.unused:
            names = [f"{what} ({count} rows)" for what, count in Counter(self.unused).most_common(MAX_NAMED)]
            more = f" and {len(self.unused) - MAX_NAMED} more" if len(self.unused) > MAX_NAMED else ""
            parts.append(f"ignored parts of rows: {', '.join(names)}{more}")
        parts += [f"{note} ({count} rows)" for note, count in Counter(self.notes).most_common()]
        return "; ".join(parts)


def _kinds(problems: Sequence[Problem]) -> str:
    kinds = Counter(problem.kind for problem in problems)
    reasons = "; ".join(f"{count} × {kind}" for kind, count in kinds.most_common())
    return f" ({reasons})" if reasons else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """`b` examples, padded on the right to `L`, the length of the longest.

    Args:
        input_ids: (b, L) int64.
        attention_mask: (b, L) int64, 1 for tokens and 0 for padding.
        labels: (b, L) int64, -100 outside the answers; not shifted.
        weights: (b, L) float32, the weight of each label in the loss; 0 outside the answers.
        n_tokens: number of labels, whatever their weights.
        weight: the sum of `weights`.
        first_label: the first column in which any row has a label; logits are needed from first_label - 1 on.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    n_tokens: int
    weight: float
    first_label: int


def make_examples(
    data: DataFile,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    bad_rows: BadRows,
    *,
    learn: Learn = "all",
    sample: int = 0,
    report: Callable[[str], None] = lambda line: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Examples:
    """Encode every row; a large file is encoded on all cores.

    Args:
        data: the file.
        tokenizer: of the base model, with its chat template.
        max_length: maximum tokens of prompt and answer together.
        bad_rows: handles rows that cannot be used.
        learn: "all" answers of a conversation, or its "last" one.
        sample: number of rows to encode, evenly spread; 0 for all.
        report: prints a progress line.
        stopped: called repeatedly; True ends the encoding.

    Raises:
        DataError: if there is no row to train on, or at the first bad row if `bad_rows` makes it fatal.
        StoppedError: if `stopped` returns True.
    """
    job = Job(path=data.path, tokenizer=tokenizer, max_length=max_length, learn=learn)
    examples = FlatExamples()
    problems: list[Problem] = []
    left_out: list[Problem] = []
    unused: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    n_rows = weight_0 = of_weight_0 = truncated = 0
    what = f"tokenizing {shown(data.path)}"
    if data.n_lines > MANY_ROWS:
        report(f"{what}: about {data.n_lines:,} rows" if not sample else f"{what}: {sample:,} of its rows")
    progress = Progress(report, what, 0 if sample else data.n_lines)
    with closing(_encoded(data, job, sample, stopped)) as encoded:
        for made in encoded:
            n_rows += 1
            progress.at(n_rows)
            for problem in (made,) if isinstance(made, Problem) else made.left_out:
                bad_rows.check(problem)
            if isinstance(made, Problem):
                problems.append(made)
                continue
            examples.extend(made.examples)
            left_out += made.left_out
            weight_0 += made.weight_0
            of_weight_0 += not made.examples
            truncated += made.truncated
            unused.update(made.unused)
            notes.update(made.notes)
    data.check_unchanged()
    used = Examples(
        examples=examples,
        n_rows=n_rows,
        problems=tuple(problems),
        left_out=tuple(left_out),
        weight_0=weight_0,
        of_weight_0=of_weight_0,
        truncated=truncated,
        max_length=max_length,
        unused=unused,
        notes=notes,
    )
    used.report(data.path, bad_rows)
    if not examples:
        too_long = any(problem.about == "max_length" for problem in problems)
        advice = f"{'raise max_length (fedmoe expert set), or ' if too_long else ''}correct the file"
        raise DataError(
            f"nothing to train on in {shown(data.path)}: {used.summary()}; {advice}", about="rows"
        )
    return used


def _encoded(
    data: DataFile, job: Job, sample: int, stopped: Callable[[], bool]
) -> Generator[Encoded | Problem]:
    rows, n_bytes = records(data.path), data.path.stat().st_size
    if sample and sample < (n_rows := sum(1 for _ in records(data.path))):
        wanted = {i * n_rows // sample for i in range(sample)}
        rows = (record for record in rows if record.number in wanted)
        n_bytes = n_bytes * sample // n_rows
    return encode_rows(rows, job, processes=n_processes(n_bytes), stopped=stopped)


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad on the right, so that positions and the shift of the loss need no correction."""
    shape = len(examples), max(len(example.input_ids) for example in examples)
    input_ids = torch.full(shape, pad_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, NO_LABEL)
    weights = torch.zeros(shape)
    for i, example in enumerate(examples):
        ids = torch.frombuffer(example.input_ids, dtype=torch.int32)
        input_ids[i, : len(ids)] = ids
        attention_mask[i, : len(ids)] = 1
        for start, stop, weight in example.answers:
            labels[i, start:stop] = ids[start:stop]
            weights[i, start:stop] = weight
    answers = [answer for example in examples for answer in example.answers]
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=labels,
        weights=weights,
        n_tokens=sum(answer.stop - answer.start for answer in answers),
        weight=sum((answer.stop - answer.start) * answer.weight for answer in answers),
        first_label=min(answer.start for answer in answers),
    )


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id of the pad token, else of the end of sequence, else 0; any id works, because padding is masked."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def indices(position: int, count: int, n_rows: int, seed: int) -> list[int]:
    """Rows number position … position+count-1 of an endless sequence that is shuffled again in every epoch.

    Pure: a place in the data is one integer, so a resumed worker continues exactly where it was.
    """
    return [_shuffled(n_rows, seed, k // n_rows)[k % n_rows] for k in range(position, position + count)]


@lru_cache(maxsize=2)
def _shuffled(n_rows: int, seed: int, epoch: int) -> "array[int]":
    # Hashed, because torch uses only 32 bits of a seed, and with seed + epoch two seeds would share orders.
    digest = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return array("q", torch.randperm(n_rows, generator=generator).tolist())
