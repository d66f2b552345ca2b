"""Reads one row of a data file, in any common shape, as a conversation.

| shape | known from |
| --- | --- |
| `{"prompt": "…", "completion": "…"}` | TRL, OpenAI's older files |
| `{"prompt": [turns], "completion": [turns]}` | TRL, conversational |
| `{"messages": [{"role": "user", "content": "…"}, …]}` | OpenAI, TRL; content may be a list of text parts |
| `{"conversations": [{"from": "human", "value": "…"}, …]}` | ShareGPT |
| `{"instruction": "…", "input": "…", "output": "…", "history": [["…", "…"], …]}` | Alpaca |
| `{"instruction": "…", "context": "…", "response": "…"}` | Dolly |
| `{"question": "…", "context": "…", "answer": "…"}` | question answering, text to SQL |

`completion`, `output`, `response` and `answer` mean the same, as do `instruction`, `prompt`, `question` and `query`.
`input` and `context` beside them become part of the question. `system` may be beside any of them. Upper and lower case
are the same. Turns after the assistant's last turn are dropped. `weight`, `train` and `loss` of a turn or a row weigh
its answers, and so does `label` or `kto_tag` of a KTO row. The chat template receives `tools`, which may be beside any
of them, and the reasoning of an answer: a field `reasoning_content`, `thinking` or `reasoning` beside its content, or
parts of type "thinking" in it. `source`, `document`, `repo`, `file`, `path` or `url` names where a row comes from, so
that validation rows can be held back by source. A field that none of these rules uses is reported by name.
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
SOURCES = ("source", "document", "doc_id", "repo", "file", "path", "url")
# These fields count only as true or false, because a row may have another label, or a measured loss.
FLAGS = ("label", "kto_tag", "train", "loss")
MAX_NAMED_FIELDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The content of one row.

    Args:
        turns: at least two; the last is the assistant's.
        tools: JSON schemas of the functions that the assistant may call.
        unused: names of the fields that are not empty and that no rule uses, each once, as they are printed.
        source: where the row comes from, as it says; "" if it does not.
    """

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...]
    unused: tuple[str, ...]
    source: str = ""


def read_conversation(row: object) -> Conversation:
    """Read the turns of a row up to the assistant's last turn, whose text may be empty.

    Raises:
        RowError: if the row has none of the shapes above; the subject of the message is "it", the row.
    """
    if not isinstance(row, dict):
        raise RowError(f"it is {kind(row)}, not a JSON object", about="row")
    fields = _Fields(row)
    turns = _weighed(_turns(fields), fields)
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise RowError("it has no assistant turn to learn from", about="answer")
    if answers[-1] == 0:
        raise RowError("it has nothing before its answer", about="prompt")
    if turns[answers[-1] + 1 :]:
        fields.report_unused("turns after the last answer")
    tools = _tools(fields.use("tools"))
    source = fields.text(SOURCES)
    return Conversation(
        turns=tuple(turns[: answers[-1] + 1]), tools=tools, unused=fields.unused(), source=source
    )


class _Fields:
    """A row's fields by name in lower case; records which of them were used."""

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
        """The first of `names` that has a value, else the first that the row has."""
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

    def text(self, names: Sequence[str]) -> str:
        """The first of these fields that is a text or a whole number, "" if none is; all others are left unused."""
        for name in names:
            value = self._values.get(name)
            if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
                self._used.add(name)
                return str(value).strip()
        return ""

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
    """OpenAI's list of tools, or that list as JSON text, as in the files of LLaMA-Factory."""
    if not value:
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            raise RowError("its tools are not JSON", about="JSON") from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("its tools are not a list of objects", about="tools")
    read_text(json.dumps(value, ensure_ascii=False), "tools")
    return tuple(value)


def _weighed(turns: list[Turn], fields: _Fields) -> list[Turn]:
    """The turns, with the weight of each answer multiplied by that of the row."""
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
        raise RowError("it has no question and answer", wanted, about="question")
    asked = _one_or_more(fields, question, "user")
    for name in CONTEXTS:
        if name == question or not (value := fields.use(name)):
            continue
        text, context = asked[-1].content, read_text(value, name)
        # In some files the prompt contains the context already.
        if question != "prompt" or context.strip() not in text:
            asked[-1] = replace(asked[-1], content=f"{text}\n\n{context}")
    return [*_history(fields.use("history")), *asked, *_one_or_more(fields, answer, "assistant")]


def _history(pairs: object) -> list[Turn]:
    if not pairs:
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RowError("its history is not a list of [question, answer] pairs", about="history")
    texts = [read_text(text, "history") for pair in pairs for text in pair]
    return [Turn(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]


def _one_or_more(fields: _Fields, name: str, role: str) -> list[Turn]:
    value = fields.use(name)
    if isinstance(value, list) and value:
        return read_turns(value, name, fields.report_unused)
    return [Turn(role=role, content=read_text(value, name))]
