"""What a tokenizer's chat template writes: the prompt of an answer, and what stands around the answer.

What it writes around an answer is found by rendering a marker in its place, so that the answer is learnt as it
stands in the file, even where the template would trim it or drop its reasoning. In the same way it is found out
which turns a template leaves out.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from fedmoe.data.turns import REASONING, Turn
from fedmoe.errors import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "\ue000answer\ue000"
# What other people's templates raise; `raise_exception` in them is a TemplateError.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
Tools = tuple[dict[str, Any], ...]


class Written(NamedTuple):
    """What the template writes.

    Args:
        prompt: what the model sees when it is asked, with the generation prompt.
        lead: what stands between that and the answer's text, with the reasoning that the turn has.
        end: what ends the answer.
    """

    prompt: str
    lead: str
    end: str


class ChatTemplate:
    """The chat template of a tokenizer, which must have one."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._eos: str = tokenizer.eos_token or ""
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        control = sorted((text for text in added if text.strip()), key=len, reverse=True)
        self._control_token = re.compile("|".join(map(re.escape, control)) or "(?!)")
        self._left_out: dict[tuple[bool, tuple[str, ...]], str] = {}

    def write(self, turns: Sequence[Turn], tools: Tools = ()) -> Written:
        """What the template writes for the last turn, an answer.

        Raises:
            RowError: if it refuses the turns, or leaves out what the row says.
        """
        refusal = RowError("the chat template refuses it")
        for prompt in (turns[:-1], _merged_turns(turns[:-1])):
            try:
                asked = self._render(prompt, tools, add_generation_prompt=True)
                answered = self._render([*prompt, replace(turns[-1], content=MARKER)], tools)
                # Some leave out a system turn without a word; then the merged turns are tried.
                left_out = self._role_left_out(prompt, tools)
            except TEMPLATE_ERRORS as error:
                words = " ".join(str(error).split())[:100]
                refusal = RowError("the chat template refuses it", f" ({words or type(error).__name__})")
                continue
            if not left_out:
                break
            refusal = RowError(f"the chat template drops its {left_out} turn")
        else:
            raise refusal
        if tools and asked == self._without_tools(prompt):
            raise RowError("the chat template leaves its tools out of the prompt")
        if MARKER not in answered:
            raise RowError("the chat template drops its answer")
        before, _, tail = answered.rpartition(MARKER)
        lead = before.removeprefix(asked) if before.startswith(asked) else ""
        if not self._shows_reasoning and any(turn.reasoning for turn in turns):
            raise RowError("the chat template leaves its reasoning out")
        if turns[-1].reasoning.strip() not in lead:
            raise RowError(
                "the chat template ends its prompt after the place for reasoning: the row's cannot be used"
            )
        return Written(asked, lead, self._end_of_turn(tail))

    @cached_property
    def sample(self) -> str:
        """Conversations as the template writes them; without those that it refuses."""
        system = Turn(role="system", content="s")
        question, answer = Turn(role="user", content="q"), Turn(role="assistant", content=MARKER)
        text = ""
        for turns in ([question, answer, question], [question, answer], [system, question]):
            with suppress(*TEMPLATE_ERRORS):
                text += self._render(turns, (), add_generation_prompt=turns[-1] is question)
        return text

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """What may end an answer; some templates write another end behind the last one."""
        ends = (self._end_of_turn(tail).strip() for tail in self.sample.split(MARKER)[1:])
        return tuple(end for end in ends if end)

    def literals(self, roles: Sequence[str]) -> list[str] | None:
        """What the template writes before, between and after the texts of a prompt's turns; None if it refuses them."""
        marked = [Turn(role=role, content=f"\ue000{i}\ue000") for i, role in enumerate(roles)]
        try:
            text = self._render(marked, (), add_generation_prompt=True)
        except TEMPLATE_ERRORS:
            return None
        literals: list[str] = []
        for turn in marked:
            before, mark, text = text.partition(turn.content)
            literals.append(before)
            if not mark:
                return None
        return [*literals, text]

    def _without_tools(self, turns: Sequence[Turn]) -> str | None:
        """The prompt as it would be without them; None if the template then refuses it."""
        with suppress(*TEMPLATE_ERRORS):
            return self._render(turns, (), add_generation_prompt=True)
        return None

    def _role_left_out(self, turns: Sequence[Turn], tools: Tools) -> str:
        """The role of a turn that the template does not write into the prompt, "" if it writes them all."""
        kind = bool(tools), tuple(turn.role for turn in turns)
        if kind not in self._left_out:
            marked = [replace(turn, content=f"\ue000{i}\ue000") for i, turn in enumerate(turns)]
            text = self._render(marked, tools, add_generation_prompt=True)
            self._left_out[kind] = next((turn.role for turn in marked if turn.content not in text), "")
        return self._left_out[kind]

    @cached_property
    def _shows_reasoning(self) -> bool:
        """Whether it writes what a last turn has of it; many drop that of earlier turns, as the model is asked."""
        turns = Turn(role="user", content="q"), Turn(role="assistant", content="a", reasoning=MARKER)
        try:
            return MARKER in self._render(turns, ())
        except TEMPLATE_ERRORS:
            return False

    def _render(self, turns: Sequence[Turn], tools: Tools, *, add_generation_prompt: bool = False) -> str:
        text = self._tokenizer.apply_chat_template(
            [_message(turn) for turn in turns],
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return str(text)

    def _end_of_turn(self, tail: str) -> str:
        """The first control token, where generation stops, and what leads to it; not the newline after it."""
        match = self._control_token.search(tail)
        return tail[: match.end()] if match else tail.rstrip() + self._eos


def _message(turn: Turn) -> dict[str, str]:
    """The turn as a template takes it; each reads the reasoning under one of several names."""
    reasoning = dict.fromkeys(REASONING, turn.reasoning) if turn.reasoning else {}
    return {"role": turn.role, "content": turn.content, **reasoning}


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
