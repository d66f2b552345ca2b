"""One row of a data file, in any of the shapes that people have, as a conversation.

| shape | known from |
| --- | --- |
| `{"prompt": "…", "completion": "…"}` | TRL, OpenAI's older files |
| `{"prompt": [turns], "completion": [turns]}` | TRL, conversational |
| `{"messages": [{"role": "user", "content": "…"}, …]}` | OpenAI, TRL; content may be a list of text parts |
| `{"conversations": [{"from": "human", "value": "…"}, …]}` | ShareGPT |
| `{"instruction": "…", "input": "…", "output": "…", "history": [["…", "…"], …]}` | Alpaca |
| `{"instruction": "…", "context": "…", "response": "…"}` | Dolly |
| `{"question": "…", "context": "…", "answer": "…"}` | question answering, text to SQL |

`completion`, `output`, `response` and `answer` mean the same, as do `instruction`, `prompt`, `question` and
`query`; `input` and `context` beside them become part of the question; `system` may stand beside any of them;
upper and lower case are the same. What follows the assistant's last turn is dropped. A turn's, and a row's,
`weight`, `train` and `loss` say how much answers count, and so does the `label` or `kto_tag` of a KTO row. `tools`
beside any of them are for the chat template, and so is an answer's reasoning, which stands beside its content as
`reasoning_content`, `thinking` or `reasoning`, or in it as parts of type "thinking". A field that is in none of these
rules is not used, and its name is reported.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedmoe.data.turns import Turn, holds_something, kind, named, read_text, read_turns, read_weight
from fedmoe.errors import RowError

LISTS = ("messages", "conversations", "conversation")
# `instruction` comes first because some Alpaca files also carry a `prompt` that already holds the answer.
QUESTIONS = ("instruction", "prompt", "question", "query", "input")
CONTEXTS = ("input", "context")
ANSWERS = ("completion", "output", "response", "answer")
SYSTEMS = ("system", "system_prompt")
# A row may have a label of another kind, or a loss that somebody measured: these count only as true or false.
FLAGS = ("label", "kto_tag", "train", "loss")
MAX_NAMED_FIELDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What one row says.

    Args:
        turns: at least two; the last is the assistant's.
        tools: JSON schemas of the functions that the assistant may call.
        unused: what holds something and is not used by any rule, each once, as it is printed.
    """

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...]
    unused: tuple[str, ...]


def read_conversation(row: object) -> Conversation:
    """The turns of a row up to the assistant's last one, whose text may be empty.

    Raises:
        RowError: if the row has none of the shapes above; the message says so of "it", the row.
    """
    if not isinstance(row, dict):
        raise RowError(f"it is {kind(row)}, not a JSON object")
    fields = _Fields(row)
    turns = _weighed(_turns(fields), fields)
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise RowError("it has no assistant turn to learn from")
    if answers[-1] == 0:
        raise RowError("it has nothing before its answer")
    if turns[answers[-1] + 1 :]:
        fields.report_unused("turns after the last answer")
    tools = _tools(fields.use("tools"))
    return Conversation(turns=tuple(turns[: answers[-1] + 1]), tools=tools, unused=fields.unused())


class _Fields:
    """A row's fields by name in lower case; remembers which of them were used."""

    def __init__(self, row: dict[str, Any]) -> None:
        self._values: dict[str, Any] = {}
        self._unused: dict[str, None] = {}
        for name, value in row.items():
            key = name.strip().lower()
            if key in self._values:
                self.report_unused(named(name))
            else:
                self._values[key] = value
        self._used: set[str] = set()

    def pick(self, names: Sequence[str]) -> str | None:
        """The first of `names` that has a value, else the first that is there."""
        present = [name for name in names if name in self._values]
        return next(
            (name for name in present if self._values[name] is not None), present[0] if present else None
        )

    def use(self, name: str) -> Any:
        """The field's value; None if there is no such field."""
        self._used.add(name)
        return self._values.get(name)

    def flag(self, name: str) -> bool | None:
        """The field's value if it is true or false; anything else is left unused."""
        return self.use(name) if isinstance(self._values.get(name), bool) else None

    def report_unused(self, what: str) -> None:
        self._unused[what] = None

    def names(self) -> str:
        return ", ".join(map(named, list(self._values)[:MAX_NAMED_FIELDS])) or "none"

    def unused(self) -> tuple[str, ...]:
        left = [
            name for name in self._values if name not in self._used and holds_something(self._values[name])
        ]
        return (*map(named, left), *self._unused)


def _turns(fields: _Fields) -> list[Turn]:
    if listed := fields.pick(LISTS):
        turns = read_turns(fields.use(listed), listed, fields.report_unused)
    else:
        turns = _question_and_answer(fields)
    system = fields.pick(SYSTEMS)
    if system and turns[:1] and turns[0].role != "system" and (value := fields.use(system)):
        turns.insert(0, Turn(role="system", content=read_text(value, system)))
    return turns


def _tools(value: object) -> tuple[dict[str, Any], ...]:
    """OpenAI's list of tools, or its JSON as LLaMA-Factory's files have it."""
    if not value:
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            raise RowError("its tools are not JSON") from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("its tools are not a list of objects")
    read_text(json.dumps(value, ensure_ascii=False), "tools")
    return tuple(value)


def _weighed(turns: list[Turn], fields: _Fields) -> list[Turn]:
    """The turns with the row's own weight in that of each answer."""
    weight = read_weight(fields.use("weight"), "weight")
    if any(fields.flag(name) is False for name in FLAGS):
        weight = 0.0
    if weight == 1:
        return turns
    return [
        replace(turn, weight=turn.weight * weight) if turn.role == "assistant" else turn for turn in turns
    ]


def _question_and_answer(fields: _Fields) -> list[Turn]:
    question, answer = fields.pick(QUESTIONS), fields.pick(ANSWERS)
    if question is None or answer is None:
        wanted = f": its fields are {fields.names()}; it needs 'prompt' and 'completion', or 'messages'"
        raise RowError("it has no question and answer", wanted)
    asked = _one_or_more(fields, question, "user")
    for name in CONTEXTS:
        if name == question or not (value := fields.use(name)):
            continue
        text, context = asked[-1].content, read_text(value, name)
        # Some files have put it into the prompt already.
        if question != "prompt" or context.strip() not in text:
            asked[-1] = replace(asked[-1], content=f"{text}\n\n{context}")
    return [*_history(fields.use("history")), *asked, *_one_or_more(fields, answer, "assistant")]


def _history(pairs: object) -> list[Turn]:
    if not pairs:
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RowError("its history is not a list of [question, answer] pairs")
    texts = [read_text(text, "history") for pair in pairs for text in pair]
    return [Turn(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]


def _one_or_more(fields: _Fields, name: str, role: str) -> list[Turn]:
    value = fields.use(name)
    if isinstance(value, list) and value:
        return read_turns(value, name, fields.report_unused)
    return [Turn(role=role, content=read_text(value, name))]
