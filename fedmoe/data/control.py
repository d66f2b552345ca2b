"""Handles control tokens in the text of rows, which the model would read as the structure of a conversation.

Control tokens at the end of an answer are removed. A prompt that is a whole conversation in the form of the chat
template is split into its turns. Both are noted. Any other control token would end an answer or begin a turn in the
middle of a text, so its row cannot be used.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, NamedTuple

from fedmoe.data.template import ChatTemplate, Tools
from fedmoe.data.turns import Turn
from fedmoe.errors import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_EARLIER_ANSWERS = 16  # in a prompt that is split into turns
ENDS_TAKEN_OFF = "control tokens at the end of answers were removed"
UNWRAPPED = "prompts that already contain chat template markup were split into turns"
# These mark reasoning in answers, whether they are control tokens or not.
NOT_STRUCTURE = ("<think>", "</think>")
# Control tokens of well-known chat templates; plain text for every other tokenizer.
WELL_KNOWN = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "</s>", "[INST]", "[/INST]", "<|system|>", "<|user|>", "<|assistant|>",
    "<|end|>",
)  # fmt: skip


class Prepared(NamedTuple):
    """A row's turns without control tokens, and notes on what was changed or found."""

    turns: tuple[Turn, ...]
    notes: tuple[str, ...]


class ControlTokens:
    """The control tokens that structure the conversations of one tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate) -> None:
        self._template = template
        self._bos: str = tokenizer.bos_token or ""
        marks = [tokenizer.eos_token, tokenizer.pad_token, *template.ends]
        self._ends = [mark for mark in dict.fromkeys(marks) if mark]
        added = list(tokenizer.added_tokens_decoder.values())
        written = template.sample
        used = [
            t.content for t in added if t.special and t.content in written and t.content not in NOT_STRUCTURE
        ]
        self._structure = _any_of(filter(None, [*used, self._bos, tokenizer.eos_token, tokenizer.pad_token]))
        names = {token.content for token in added}
        self._foreign = _any_of(name for name in WELL_KNOWN if name not in names and name not in written)
        self._pattern = cache(self._make_pattern)

    def prepare(self, turns: Sequence[Turn], tools: Tools) -> Prepared:
        """Return the turns in the form that the template needs.

        Raises:
            RowError: if a control token stands in the middle of a text.
        """
        notes: list[str] = []
        bare = [self._without_end(turn) if turn.role == "assistant" else turn for turn in turns]
        if bare != list(turns):
            notes.append(ENDS_TAKEN_OFF)
        if unwrapped := self._unwrap(bare):
            bare = unwrapped
            notes.append(UNWRAPPED)
        for turn in bare:
            self._check(f"{turn.content}\n{turn.reasoning}", f"its {turn.role} turn")
        self._check(json.dumps(tools, ensure_ascii=False), "its tools")
        foreign = {found for turn in bare for found in self._foreign.findall(turn.content)}
        notes += [
            f"{name!r} is trained on as plain text, because it is no control token of this model"
            for name in sorted(foreign)
        ]
        return Prepared(tuple(bare), tuple(notes))

    def _without_end(self, turn: Turn) -> Turn:
        """Remove the end of turn, which answers written for other tools often contain."""
        answer = turn.content
        while mark := next((mark for mark in self._ends if answer.rstrip().endswith(mark)), ""):
            answer = answer.rstrip().removesuffix(mark)
        return turn if answer == turn.content else replace(turn, content=answer)

    def _check(self, text: str, where: str) -> None:
        if found := self._structure.search(text):
            raise RowError(
                "it holds a control token",
                f": {found[0]!r} in {where} would begin or end a turn, remove it",
                about="control_token",
            )

    def _unwrap(self, turns: Sequence[Turn]) -> list[Turn] | None:
        """Split a prompt in the form of the template into turns, with the answer; None if it has another form."""
        prompt, after = turns[0].content, self._after_question
        if len(turns) != 2 or not after or not prompt.rstrip().endswith(after):
            return None
        # As many as stand there first: without control tokens, a question could be taken for a whole conversation.
        likely = min(prompt.count(after) - 1, MAX_EARLIER_ANSWERS)
        for n_answers in (likely, *range(MAX_EARLIER_ANSWERS + 1)):
            for system in ((), ("system",)):
                roles = (*system, *("user", "assistant") * n_answers, "user")
                pattern = self._pattern(roles)
                if pattern and (found := pattern.fullmatch(prompt)):
                    texts = zip(roles, found.groups(), strict=True)
                    return [*(Turn(role=role, content=text) for role, text in texts), turns[1]]
        return None

    @cached_property
    def _after_question(self) -> str:
        """The text with which the template ends every prompt."""
        literals = self._template.literals(("user",))
        return literals[-1].strip() if literals else ""

    def _make_pattern(self, roles: tuple[str, ...]) -> "re.Pattern[str] | None":
        """A pattern that matches a prompt with turns of these roles; its groups are their texts."""
        literals = self._template.literals(roles)
        if not literals:
            return None
        text = rf"((?:(?!{self._structure.pattern}).)*?)"
        first = literals[0].removeprefix(self._bos)
        begin = f"(?:{re.escape(self._bos)})?{re.escape(first)}"
        middle = text.join([begin, *map(re.escape, literals[1:-1]), re.escape(literals[-1].rstrip())])
        return re.compile(rf"{middle}\s*", re.DOTALL)


def _any_of(texts: Iterable[str]) -> "re.Pattern[str]":
    longest_first = sorted(set(texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
