"""Encodes one row as examples: token ids, and which of them are answers to learn, with their weights.

The result depends on the row, the tokenizer and the settings alone, so rows can be encoded in any order and in any
process.
"""

import hashlib
import json
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
HASHES = 2**63  # above every `row_hash`


class Answer(NamedTuple):
    """The tokens of one answer in an example (start to stop - 1), and the weight of each of them in the loss."""

    start: int
    stop: int
    weight: float


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation as tokens; `answers` are the labels: at least one, in order, none of them empty.

    `line` is the line of the file at which the row begins, from 1; 0 if it is not known. `row` is a hash of the row's
    conversation, and `source` one of what the row names as its source; 0 if it is not known.
    """

    input_ids: "array[int]"
    answers: tuple[Answer, ...]
    line: int = 0
    row: int = 0
    source: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The result of encoding one row.

    Args:
        examples: none if every answer has weight 0.
        truncated: number of examples that were truncated to max_length.
        left_out: problems of answers that cannot be learnt, in a row with other answers.
        weight_0: number of answers with weight 0, which are not learnt.
        unused: as in the row.
        notes: what was changed or found in the texts of the row.
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
    """Encode the row's answers (learn "all") or its last one as examples; return the problem if that fails."""
    row = read_row(path, record)
    if isinstance(row, Problem):
        return row
    try:
        return _encode(row, path, encoder, max_length, learn)
    except RowError as error:
        return Problem.of(error, path, row.number, row.line)


def _encode(row: Row, path: Path, encoder: Encoder, max_length: int, learn: Learn) -> Encoded:
    """Encode the row.

    An answer whose prompt begins with the last example becomes part of that example. So a conversation is one example
    where the chat template allows it; some templates drop from a prompt what they wrote around earlier answers.
    An answer that is too long is truncated and loses its end of turn; a prompt is never truncated.

    Raises:
        RowError: if the row has answers to learn, but none of them can be learnt.
    """
    turns, notes = encoder.prepare(row.turns, row.tools)
    places = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    examples: list[tuple[list[int], tuple[Answer, ...]]] = []
    left_out: list[AnswerError] = []
    # To render a conversation of a thousand answers again for each of them would take minutes. A prompt gets shorter
    # only if reasoning is dropped from it.
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
    content = row_hash([[[turn.role, turn.content, turn.reasoning] for turn in row.turns], row.tools])
    source = row_hash(row.source) if row.source else 0
    return Encoded(
        examples=tuple(
            Example(array("i", ids[:max_length]), answers, row.line, content, source)
            for ids, answers in examples
        ),
        truncated=sum(len(ids) > max_length for ids, _ in examples),
        left_out=tuple(_answer_left_out(error, path, row) for error in left_out),
        weight_0=weight_0,
        unused=row.unused,
        notes=notes,
    )


def row_hash(content: object) -> int:
    """A number in [0, HASHES), the same for equal content (JSON) on every machine."""
    text = json.dumps(content, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _answer_left_out(error: AnswerError, path: Path, row: Row) -> Problem:
    problem = Problem.of(error, path, row.number, row.line)
    return replace(problem, reason=f"one of its answers is not learnt: {error}")
