"""Encodes an answer and its prompt as token ids, with one tokenizer and its chat template.

The ids of the prompt are those of inference: the template's, with the generation prompt. The end of turn is a label,
too; otherwise the model would not learn to stop.
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
    """One answer cannot be learnt, but others of its row may be; the subject of the message is "it", the row."""


class NoRoomError(AnswerError):
    """The prompt alone exceeds max_length."""


class Encoder:
    """Encodes answers and their prompts as token ids."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.chat_template:  # fedmoe.model.tokenizer.use_template asks for one earlier
            raise DataError(
                "neither the base model nor the expert has a chat template: start a worker with --chat-template FILE",
                about="chat_template",
            )
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._control = ControlTokens(tokenizer, self._template)

    def prepare(self, turns: Sequence[Turn], tools: Tools = ()) -> Prepared:
        """Remove the control tokens from a row's turns, as `encode` needs it.

        Raises:
            RowError: if a control token stands in the middle of a text.
        """
        return self._control.prepare(turns, tools)

    def encode(
        self, turns: Sequence[Turn], tools: Tools = (), *, max_length: int = sys.maxsize
    ) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the answer (the last turn) with its end of turn; neither is empty.

        If prompt and answer exceed `max_length`, the end of the answer may be missing.

        Raises:
            AnswerError: if there is no answer, no prompt, or no room for the answer.
            RowError: if the template refuses the turns, or leaves out a part of the row.
        """
        if len(turns) == 1:
            raise AnswerError("it has nothing before its answer", about="prompt")
        text = turns[-1].content
        if not text.strip():
            raise AnswerError("its answer is empty", about="answer")
        if turns[-1].reasoning and THOUGHT in text:
            raise RowError(
                "it has reasoning both in its answer (</think>) and in a field or part of its own",
                about="think",
            )
        prompt, lead, end = self._template.write(turns, tools)
        answer = _join_reasoning(prompt, lead, text) + end
        prompt_ids = first_tokens(self.token_ids, prompt, max_length)
        if len(prompt_ids) >= max_length:
            raise NoRoomError(
                f"its prompt leaves no room for the answer (max_length {max_length} tokens)",
                about="max_length",
            )
        both = first_tokens(self.token_ids, prompt + answer, max_length)
        # The joint text is tokenized first, because some tokenizers put a space in front of each text. But at inference
        # no token crosses the border; if one does, the answer is tokenized alone.
        joint = both[: len(prompt_ids)] == prompt_ids
        answer_ids = both[len(prompt_ids) :] if joint else first_tokens(self.token_ids, answer, max_length)
        if not prompt_ids or not answer_ids:
            raise RowError("its prompt or its answer has no tokens", about="tokens")
        return prompt_ids, answer_ids

    def token_ids(self, text: str) -> list[int]:
        """The ids of a text, without special tokens added."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids


def _join_reasoning(prompt: str, lead: str, answer: str) -> str:
    """The text after the prompt, in which the reasoning begins once and ends once.

    A template for reasoning models may open the reasoning in the prompt, or put an empty one before the answer.
    """
    opened = prompt.rstrip().endswith(THINK)
    if THOUGHT in answer:
        lead = "" if THOUGHT in lead else lead
        return lead + (answer.lstrip().removeprefix(THINK).lstrip("\n") if opened else answer)
    if opened and THOUGHT not in lead:
        lead = f"\n{THOUGHT}\n\n"
    return lead + answer
