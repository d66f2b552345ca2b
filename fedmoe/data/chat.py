"""An answer and what stands before it → token ids, as one tokenizer and its chat template make them.

The prompt's ids are those that the model sees when it is asked: the template's, with the generation prompt. The
end of turn is learnt too, else the model would never stop.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedmoe.data.beginning import first_tokens
from fedmoe.data.control import ControlTokens, Prepared
from fedmoe.data.template import ChatTemplate, Tools
from fedmoe.data.turns import Turn
from fedmoe.errors import DataError, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK, THOUGHT = "<think>", "</think>"


class AnswerError(RowError):
    """Why one answer cannot be learnt, though others of its row may be; the message says so of "it", the row."""


class NoRoomError(AnswerError):
    """The prompt alone is too long."""


class Encoder:
    """Makes token ids of answers and their prompts."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.chat_template:  # fedmoe.model.tokenizer.use_template asks for one, in time
            raise DataError(
                "neither the base model nor the expert has a chat template: start a worker with --chat-template FILE"
            )
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._control = ControlTokens(tokenizer, self._template)

    def prepare(self, turns: Sequence[Turn], tools: Tools = ()) -> Prepared:
        """A row's turns without control tokens, as `encode` takes them.

        Raises:
            RowError: if a control token stands in the middle of a text.
        """
        return self._control.prepare(turns, tools)

    def encode(
        self, turns: Sequence[Turn], tools: Tools = (), *, max_length: int = sys.maxsize
    ) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the answer, the last turn, with its end of turn; neither is empty.

        Of an answer that `max_length` cuts off, its end may be missing.

        Raises:
            AnswerError: if there is no answer, nothing before it, or no room for it.
            RowError: if the template refuses the turns, or leaves out what the row says.
        """
        if len(turns) == 1:
            raise AnswerError("it has nothing before its answer")
        text = turns[-1].content
        if not text.strip():
            raise AnswerError("its answer is empty")
        if turns[-1].reasoning and THOUGHT in text:
            raise RowError("it has reasoning both in its answer (</think>) and in a field or part of its own")
        prompt, lead, end = self._template.write(turns, tools)
        answer = _join_reasoning(prompt, lead, text) + end
        prompt_ids = first_tokens(self._ids, prompt, max_length)
        if len(prompt_ids) >= max_length:
            raise NoRoomError(f"its prompt leaves no room for the answer (max_length {max_length} tokens)")
        both = first_tokens(self._ids, prompt + answer, max_length)
        # The joint text first, because some tokenizers put a space in front of whatever they are given. But a
        # token across the border does not exist when the model is asked: then the answer is taken alone.
        joint = both[: len(prompt_ids)] == prompt_ids
        answer_ids = both[len(prompt_ids) :] if joint else first_tokens(self._ids, answer, max_length)
        if not prompt_ids or not answer_ids:
            raise RowError("its prompt or its answer has no tokens")
        return prompt_ids, answer_ids

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids


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
