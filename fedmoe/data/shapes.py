"""One row of a data file, in any of the shapes that people have: the turns before the answer, and the answer.

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
`query`; `system` may stand beside any of them; upper and lower case are the same. Of several turns only the
assistant's last is learnt: what stands before it is the prompt, what follows it is cut off.
"""

import reprlib
from collections.abc import Sequence
from typing import Any, TypedDict

from fedmoe.errors import RowError

ROLES = (
    dict.fromkeys(("system", "developer"), "system")
    | dict.fromkeys(("user", "human", "prompter"), "user")
    | dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai"), "assistant")
    | dict.fromkeys(("tool", "function", "observation", "ipython"), "tool")
)
LISTS = ("messages", "conversations", "conversation")
# `instruction` comes first because some Alpaca files also carry a `prompt` that already holds the answer.
QUESTIONS = ("instruction", "prompt", "question", "query", "input")
CONTEXTS = ("input", "context")
ANSWERS = ("completion", "output", "response", "answer")
TEXT_PARTS = ("text", "input_text", "output_text")
MAX_NAMED_FIELDS = 8
_KINDS = {
    dict: "an object",
    list: "an array",
    str: "text",
    bool: "true or false",
    type(None): "missing or null",
}


class Message(TypedDict):
    """One turn; the role is system, user, assistant or tool."""

    role: str
    content: str


def split_answer(row: object) -> tuple[tuple[Message, ...], str]:
    """The turns before the assistant's last one, and that one's text (which may be empty).

    Raises:
        RowError: if the row has none of the shapes above; the message says so of "it", the row.
    """
    if not isinstance(row, dict):
        raise RowError(f"it is {_kind(row)}, not a JSON object")
    turns = _turns({str(name).strip().lower(): value for name, value in row.items()})
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise RowError("it has no assistant turn to learn from")
    if answers[-1] == 0:
        raise RowError("it has nothing before its answer")
    return tuple(turns[: answers[-1]]), turns[answers[-1]]["content"]


def _turns(fields: dict[str, Any]) -> list[Message]:
    if listed := _pick(fields, LISTS):
        turns = _messages(fields[listed], listed)
    else:
        turns = _question_and_answer(fields)
    system = _pick(fields, ("system", "system_prompt"))
    if system and fields[system] and turns[:1] and turns[0]["role"] != "system":
        turns.insert(0, Message(role="system", content=_text(fields[system], system)))
    return turns


def _question_and_answer(fields: dict[str, Any]) -> list[Message]:
    question, answer = _pick(fields, QUESTIONS), _pick(fields, ANSWERS)
    if question is None or answer is None:
        found = ", ".join(map(reprlib.repr, list(fields)[:MAX_NAMED_FIELDS])) or "none"
        wanted = f": its fields are {found}; wanted are 'prompt' and 'completion', or 'messages'"
        raise RowError("it has no question and answer", wanted)
    asked = _one_or_more(fields[question], "user", question)
    # A prompt is complete as it is; the other kinds may have their material in a field of its own.
    if question != "prompt":
        for name in CONTEXTS:
            if name != question and fields.get(name):
                asked[-1]["content"] += "\n\n" + _text(fields[name], name)
    return [
        *_history(fields.get("history")),
        *asked,
        *_one_or_more(fields[answer], "assistant", answer),
    ]


def _history(pairs: object) -> list[Message]:
    if not pairs:
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RowError("its history is not a list of [question, answer] pairs")
    texts = [_text(text, "history") for pair in pairs for text in pair]
    return [Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)]


def _one_or_more(value: object, role: str, where: str) -> list[Message]:
    if isinstance(value, list) and value:
        return _messages(value, where)
    return [Message(role=role, content=_text(value, where))]


def _messages(value: object, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowError(f"its {where} is {_kind(value)}, not a list of messages")
    return [_message(message, f"{where}[{i}]") for i, message in enumerate(value)]


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        detail = f": its {where} is {_kind(value)}, not an object with role and content"
        raise RowError("it has a turn that is no message", detail)
    if value.get("tool_calls") or value.get("function_call"):
        raise RowError("it calls a tool", f": its {where} calls a tool, which cannot be trained on")
    role = value.get("role", value.get("from"))
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        wanted = f": its {where} has the role {reprlib.repr(role)}; wanted is system, user, assistant or tool"
        raise RowError("it has a turn of an unknown role", wanted)
    return Message(role=known, content=_text(value.get("content", value.get("value")), f"{where}.content"))


def _text(value: object, where: str) -> str:
    if isinstance(value, list):
        value = "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(value))
    if not isinstance(value, str):
        raise RowError("it holds something else than text", f": its {where} is {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        # A byte that is not UTF-8 was read as such a surrogate (see fedmoe.data.jsonl).
        if 0xDC80 <= code <= 0xDCFF:
            raise RowError(
                "it is not UTF-8",
                f": its {where} holds the byte 0x{code - 0xDC00:02x}, which is not UTF-8 "
                "(Windows-1252 or Latin-1?); save the file as UTF-8",
            ) from None
        detail = f": its {where} holds half a character (\\u{code:04x}, a lone surrogate)"
        raise RowError("it holds half a character", detail) from None
    return value


def _part(part: object, where: str) -> str:
    """Text of one of OpenAI's content parts."""
    if isinstance(part, dict) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    what = f"a part of type {reprlib.repr(part.get('type'))}" if isinstance(part, dict) else _kind(part)
    detail = f": its {where} is {what}; only parts of type 'text' can be trained on"
    raise RowError("it holds a part that is not text", detail)


def _pick(fields: dict[str, Any], names: Sequence[str]) -> str | None:
    """The first of `names` that has a value, else the first that is there."""
    present = [name for name in names if name in fields]
    return next((name for name in present if fields[name] is not None), present[0] if present else None)


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "a number")
