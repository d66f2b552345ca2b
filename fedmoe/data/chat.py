"""One row → the token ids of its prompt and of its answer, as one tokenizer and its chat template make them.

The prompt's ids are those that the model sees when it is asked: the template's, with the generation prompt.
What the template writes around an answer is found by rendering a marker in its place, so that the answer is
learnt as it stands in the file, even where the template would trim it or drop its reasoning. The end of turn
is learnt too, else the model would never stop.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from fedmoe.data.turns import Turn
from fedmoe.errors import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "\ue000answer\ue000"
THINK, THOUGHT = "<think>", "</think>"
# What other people's templates raise; `raise_exception` in them is a TemplateError.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class AnswerError(RowError):
    """Why one answer cannot be learnt, though others of its row may be; the message says so of "it", the row."""


class Encoder:
    """Makes token ids of rows; knows the tokenizer's control tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._eos: str = tokenizer.eos_token or ""
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        control = sorted((text for text in added if text.strip()), key=len, reverse=True)
        self._control_token = re.compile("|".join(map(re.escape, control)) or "(?!)")

    def encode(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the answer, the last turn, with its end of turn; neither is empty.

        Raises:
            AnswerError: if there is no answer, or nothing before it.
            RowError: if the template refuses the turns.
        """
        if len(turns) == 1:
            raise AnswerError("it has nothing before its answer")
        answer = turns[-1].content
        if not answer.strip():
            raise AnswerError("its answer is empty")
        if self._tokenizer.chat_template:
            prompt, lead, end = self._chat(turns[:-1])
            start: list[int] = []
        else:
            prompt = "".join(turn.content + "\n" for turn in turns[:-1])
            lead, end = "", self._eos
            start = self._beginning()
        answer = _join_reasoning(prompt, lead, self._without_end(answer, end)) + end
        prompt_ids = start + self._ids(prompt)
        both = start + self._ids(prompt + answer)
        # The joint text first, because some tokenizers put a space in front of whatever they are given. But a
        # token across the border does not exist when the model is asked: then the answer is taken alone.
        joint = both[: len(prompt_ids)] == prompt_ids
        answer_ids = both[len(prompt_ids) :] if joint else self._ids(answer)
        if not prompt_ids or not answer_ids:
            raise RowError("it has no tokens")
        return prompt_ids, answer_ids

    def _chat(self, prompt: Sequence[Turn]) -> tuple[str, str, str]:
        """The prompt's text, what the template writes between it and an answer, and the end of turn."""
        reason = RowError("the chat template drops its system turn")
        for turns in (prompt, _merged_turns(prompt)):
            try:
                asked = self._render(turns, add_generation_prompt=True)
                answered = self._render([*turns, Turn(role="assistant", content=MARKER)])
            except TEMPLATE_ERRORS as error:
                words = " ".join(str(error).split())[:100]
                reason = RowError("the chat template refuses it", f" ({words or type(error).__name__})")
                continue
            # Some templates drop a system turn without a word; then the merged turns are tried.
            if all(turn.content.strip() in asked for turn in turns if turn.role == "system"):
                head, _, tail = answered.rpartition(MARKER)
                lead = head.removeprefix(asked) if head.startswith(asked) else ""
                return asked, lead, self._end_of_turn(tail)
        raise reason

    def _render(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(text)

    def _end_of_turn(self, tail: str) -> str:
        """The first control token, where generation stops, and what leads to it; not the newline after it."""
        match = self._control_token.search(tail)
        return tail[: match.end()] if match else tail.rstrip() + self._eos

    def _without_end(self, answer: str, end: str) -> str:
        """Rows written for other tools often end with the end of turn already."""
        marks = [mark for mark in (end.strip(), self._eos) if mark]
        while mark := next((mark for mark in marks if answer.rstrip().endswith(mark)), ""):
            answer = answer.rstrip().removesuffix(mark)
        if not answer.strip():
            raise AnswerError("its answer is empty")
        return answer

    def _beginning(self) -> list[int]:
        """The begin-of-sequence token if the tokenizer writes it by itself; templates write their own."""
        ids: list[int] = self._tokenizer("").input_ids
        return [i for i in ids[:1] if i == self._tokenizer.bos_token_id]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids


def _merged_turns(prompt: Sequence[Turn]) -> list[Turn]:
    """The same turns for a template without a system role, or one whose roles must alternate."""
    merged: list[Turn] = []
    for turn in prompt:
        role = "user" if turn.role == "system" else turn.role
        if merged and merged[-1].role == role:
            merged[-1] = replace(merged[-1], content=f"{merged[-1].content}\n\n{turn.content}")
        else:
            merged.append(replace(turn, role=role))
    return merged


def _join_reasoning(prompt: str, lead: str, answer: str) -> str:
    """What follows the prompt: with reasoning begun once and ended once, whoever begins it.

    A template for reasoning models may open it in the prompt, or put an empty one in front of the answer.
    """
    opened = prompt.rstrip().endswith(THINK)
    if THOUGHT in answer:
        lead = "" if THOUGHT in lead else lead
        return lead + (answer.lstrip().removeprefix(THINK).lstrip("\n") if opened else answer)
    if opened and THOUGHT not in lead:
        lead = f"\n{THOUGHT}\n\n"
    return lead + answer
