"""One row → what is trained on: token ids, and which of them are answers to learn, with what weight.

All of it depends on the row, the tokenizer and the settings alone, so rows can be encoded in any order and in
any process.
"""

from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from fedmoe.data.bad_rows import Problem
from fedmoe.data.chat import THOUGHT, AnswerError, Encoder, NoRoomError
from fedmoe.data.jsonl import Row, read_row
from fedmoe.data.records import Record
from fedmoe.errors import RowError

Learn = Literal["all", "last"]


class Answer(NamedTuple):
    """Where one answer stands in an example's tokens (start to stop - 1), and how much each of them counts."""

    start: int
    stop: int
    weight: float


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation as tokens; `answers` are the labels: at least one, in order, none of them empty.

    `line` is where its row begins in the file, from 1; 0 if it is not known.
    """

    input_ids: "array[int]"
    answers: tuple[Answer, ...]
    line: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What one row gives.

    Args:
        examples: none if every answer is marked not to be learnt.
        truncated: how many of them were truncated to max_length.
        left_out: why answers are not learnt that cannot be, although others of the row are.
        weight_0: how many answers are marked not to be learnt.
        unused: as in the row.
        notes: what was done to the row's texts, or found in them.
    """

    examples: tuple[Example, ...]
    truncated: int
    left_out: tuple[Problem, ...]
    weight_0: int
    unused: tuple[str, ...]
    notes: tuple[str, ...]


def encode_row(
    record: Record, path: Path, encoder: Encoder, *, max_length: int, learn: Learn
) -> Encoded | Problem:
    """The row's answers (learn "all"), or its last one, as examples; or why there are none."""
    row = read_row(path, record)
    if isinstance(row, Problem):
        return row
    try:
        return _encode(row, path, encoder, max_length, learn)
    except RowError as error:
        return Problem.of(error, path, row.number, row.line)


def _encode(row: Row, path: Path, encoder: Encoder, max_length: int, learn: Learn) -> Encoded:
    """Encode the row.

    An answer whose prompt begins with the example so far becomes part of it, so that a conversation is one
    example where the chat template lets it be: some drop from a prompt what they wrote around earlier answers.
    Too long an answer is truncated, and then has no end of turn; a prompt is never truncated.

    Raises:
        RowError: if an answer is to be learnt and none can be.
    """
    turns, notes = encoder.prepare(row.turns, row.tools)
    places = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    examples: list[tuple[list[int], tuple[Answer, ...]]] = []
    left_out: list[AnswerError] = []
    # Rendered anew for each of a thousand answers, a long conversation would take minutes. A prompt only gets shorter
    # where reasoning is dropped from it.
    prompts_grow = not any(turn.reasoning or THOUGHT in turn.content for turn in turns)
    no_room: NoRoomError | None = None
    weight_0 = 0
    for place in places if learn == "all" else places[-1:]:
        weight = turns[place].weight
        if weight == 0:
            weight_0 += 1
            continue
        if no_room and prompts_grow:
            left_out.append(no_room)
            continue
        try:
            prompt, answer = encoder.encode(turns[: place + 1], row.tools, max_length=max_length)
        except AnswerError as error:
            left_out.append(error)
            no_room = error if isinstance(error, NoRoomError) else None
            continue
        ids = prompt + answer
        before: tuple[Answer, ...] = ()
        if examples and prompt[: len(examples[-1][0])] == examples[-1][0]:
            before = examples.pop()[1]
        examples.append((ids, (*before, Answer(len(prompt), min(len(ids), max_length), weight))))
    if left_out and not examples:
        raise left_out[-1]
    return Encoded(
        examples=tuple(Example(array("i", ids[:max_length]), answers, row.line) for ids, answers in examples),
        truncated=sum(len(ids) > max_length for ids, _ in examples),
        left_out=tuple(_answer_left_out(error, path, row) for error in left_out),
        weight_0=weight_0,
        unused=row.unused,
        notes=notes,
    )


def _answer_left_out(error: AnswerError, path: Path, row: Row) -> Problem:
    problem = Problem.of(error, path, row.number, row.line)
    return replace(problem, reason=f"one of its answers is not learnt: {error}")
