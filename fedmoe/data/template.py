"""Renders a tokenizer's chat template: the prompt of an answer, and the text around the answer.

The text around an answer is found by rendering a marker in its place. So the answer is learnt as it is in the file,
even if the template would trim it or drop its reasoning. Markers also show which turns a template leaves out.
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
# Errors that chat templates raise; `raise_exception` in them raises a TemplateError.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
Tools = tuple[dict[str, Any], ...]


class Written(NamedTuple):
    """The text that the template writes for one answer.

    Args:
        prompt: the input of the model at inference, with the generation prompt.
        lead: the text between the prompt and the answer, with the reasoning of the turn.
        end: the end of the turn.
    """

    prompt: str
    lead: str
    end: str


class ChatTemplate:
    """The chat template of a tokenizer; the tokenizer must have one."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._eos: str = tokenizer.eos_token or ""
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        control = sorted((text for text in added if text.strip()), key=len, reverse=True)
        self._control_token = re.compile("|".join(map(re.escape, control)) or "(?!)")
        self._left_out: dict[tuple[bool, tuple[str, ...]], str] = {}

    def write(self, turns: Sequence[Turn], tools: Tools = ()) -> Written:
        """Render the prompt and the surroundings of the last turn, an answer.

        Raises:
            RowError: if the template refuses the turns, or leaves out a part of the row.
        """
        prompt, asked, answered = self._render_with(turns[:-1], tools, replace(turns[-1], content=MARKER))
        if tools and asked == self._without_tools(prompt):
            raise RowError("the chat template leaves its tools out of the prompt", about="tools")
        if MARKER not in answered:
            raise RowError("the chat template drops its answer", about="answer")
        before, _, tail = answered.rpartition(MARKER)
        lead = before.removeprefix(asked) if before.startswith(asked) else ""
        if not self._shows_reasoning and any(turn.reasoning for turn in turns):
            raise RowError("the chat template leaves its reasoning out", about="reasoning")
        if turns[-1].reasoning.strip() not in lead:
            raise RowError(
                "the chat template ends its prompt after the place for reasoning: the row's cannot be used",
                about="prompt",
            )
        return Written(asked, lead, self._end_of_turn(tail))

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text after which the model answers these turns, as `write` gives it; raises RowError as it does."""
        return self._render_with(turns, ())[1]

    def _render_with(
        self, turns: Sequence[Turn], tools: Tools, answer: Turn | None = None
    ) -> tuple[Sequence[Turn], str, str]:
        """The turns that the template takes, merged if it must be, the prompt of them, and the same with the answer."""
        refusal = RowError("the chat template refuses it", about="chat_template")
        for prompt in (turns, _merged_turns(turns)):
            try:
                asked = self._render(prompt, tools, add_generation_prompt=True)
                answered = self._render([*prompt, answer], tools) if answer else ""
                # Some templates silently leave out a system turn; then the merged turns are tried.
                left_out = self._role_left_out(prompt, tools)
            except TEMPLATE_ERRORS as error:
                words = " ".join(str(error).split())[:100]
                refusal = RowError(
                    "the chat template refuses it",
                    f" ({words or type(error).__name__})",
                    about="chat_template",
                )
                continue
            if not left_out:
                return prompt, asked, answered
            refusal = RowError(f"the chat template drops its {left_out} turn", about=left_out)
        raise refusal

    @cached_property
    def sample(self) -> str:
        """Sample conversations as the template writes them, except those that it refuses."""
        system = Turn(role="system", content="s")
        question, answer = Turn(role="user", content="q"), Turn(role="assistant", content=MARKER)
        text = ""
        for turns in ([question, answer, question], [question, answer], [system, question]):
            with suppress(*TEMPLATE_ERRORS):
                text += self._render(turns, (), add_generation_prompt=turns[-1] is question)
        return text

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """Texts that may end an answer; some templates write another end after the last answer."""
        ends = (self._end_of_turn(tail).strip() for tail in self.sample.split(MARKER)[1:])
        return tuple(end for end in ends if end)

    def literals(self, roles: Sequence[str]) -> list[str] | None:
        """The template's text before, between and after the turns of a prompt; None if it refuses these roles."""
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
        """The prompt without tools; None if the template refuses it."""
        with suppress(*TEMPLATE_ERRORS):
            return self._render(turns, (), add_generation_prompt=True)
        return None

    def _role_left_out(self, turns: Sequence[Turn], tools: Tools) -> str:
        """The role of a turn that the template leaves out of the prompt, "" if it leaves out none."""
        kind = bool(tools), tuple(turn.role for turn in turns)
        if kind not in self._left_out:
            marked = [replace(turn, content=f"\ue000{i}\ue000") for i, turn in enumerate(turns)]
            text = self._render(marked, tools, add_generation_prompt=True)
            self._left_out[kind] = next((turn.role for turn in marked if turn.content not in text), "")
        return self._left_out[kind]

    @cached_property
    def _shows_reasoning(self) -> bool:
        """True if the template writes the reasoning of the last turn; many templates drop that of earlier turns."""
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
        """The text up to the first control token, at which generation stops, without the newline after it."""
        match = self._control_token.search(tail)
        return tail[: match.end()] if match else tail.rstrip() + self._eos


def end_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The control token with which the template ends a last answer, so that trained answers end there.

    A base model's own settings for generation may not name it: those of a model that was never trained to chat name the
    end of a document only. Empty if there is no template, or no such token. What ends an earlier turn may stand in the
    middle of an answer, as between the reasoning and the answer of Harmony.
    """
    turns = Turn(role="user", content="q"), Turn(role="assistant", content="a")
    try:
        end = ChatTemplate(tokenizer).write(turns).end
    except (RowError, *TEMPLATE_ERRORS):
        return set()
    return set(tokenizer(end, add_special_tokens=False).input_ids[-1:]) & set(tokenizer.added_tokens_decoder)


def _message(turn: Turn) -> dict[str, str]:
    """The turn as templates read it; they differ in the name of the field with the reasoning."""
    reasoning = dict.fromkeys(REASONING, turn.reasoning) if turn.reasoning else {}
    return {"role": turn.role, "content": turn.content, **reasoning}


def _merged_turns(prompt: Sequence[Turn]) -> list[Turn]:
    """Merge turns for a template that has no system role, or whose roles must alternate."""
    merged: list[Turn] = []
    for turn in prompt:
        role = "user" if turn.role == "system" else turn.role
        if merged and merged[-1].role == role:
            merged[-1] = replace(merged[-1], content=f"{merged[-1].content}\n\n{turn.content}")
        else:
            merged.append(replace(turn, role=role))
    return merged
