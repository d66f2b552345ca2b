"""Reads the turns of a conversation from objects of OpenAI, TRL, ShareGPT and others."""

import math
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from fedmoe.errors import RowError

ROLES = (
    dict.fromkeys(("system", "developer"), "system")
    | dict.fromkeys(("user", "human", "prompter"), "user")
    | dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai"), "assistant")
    | dict.fromkeys(("tool", "function", "observation", "ipython"), "tool")
)
TEXT_PARTS = ("text", "input_text", "output_text")
MAX_NAME_CHARS = 60
REASONING = ("reasoning_content", "thinking", "reasoning")
WEIGHTS = ("weight", "train", "loss")
_USED = ("role", "from", "content", "value", "tool_calls", "function_call")
_KINDS = {
    dict: "an object",
    list: "an array",
    str: "text",
    bool: "true or false",
    type(None): "missing or null",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn.

    Args:
        role: system, user, assistant or tool.
        reasoning: the assistant's reasoning before `content`.
        weight: weight of an answer's tokens in the loss; an answer with 0 is not learnt.
    """

    role: str
    content: str
    reasoning: str = ""
    weight: float = 1.0


def read_turns(value: object, where: str, report_unused: Callable[[str], None]) -> list[Turn]:
    """Read the turns of a list of messages; `report_unused` is called for each field that is not used.

    Raises:
        RowError: if `value` is no such list; the subject of the message is "it", the row.
    """
    if not isinstance(value, list):
        raise RowError(f"its {where} is {kind(value)}, not a list of messages", about="messages")
    turns = []
    for i, message in enumerate(value):
        turns.append(turn := _turn(message, f"{where}[{i}]"))
        for name in _unused(message, turn):
            report_unused(f"{named(f'{where}[].{name}')} of {turn.role} turns")
    return turns


def _unused(message: dict[str, Any], turn: Turn) -> Iterator[str]:
    for name, value in message.items():
        of_an_answer = turn.role == "assistant" and (name in WEIGHTS or value == turn.reasoning)
        marks_none = name in WEIGHTS and not value
        if name not in _USED and not of_an_answer and not marks_none and holds_something(value):
            yield name


def _turn(message: object, where: str) -> Turn:
    if not isinstance(message, dict):
        detail = f": its {where} is {kind(message)}, not an object with role and content"
        raise RowError("it has a turn that is no message", detail, about="turn")
    if message.get("tool_calls") or message.get("function_call"):
        raise RowError(
            "it calls a tool", f": its {where} calls a tool, which cannot be trained on", about="tool_calls"
        )
    role = message.get("role", message.get("from"))
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        wanted = (
            f": its {where} has the role {reprlib.repr(role)}; it must be system, user, assistant or tool"
        )
        raise RowError("it has a turn of an unknown role", wanted, about="role")
    content = message.get("content", message.get("value"))
    reasoning = ""
    if known == "assistant":
        thoughts, content = _thoughts(content, f"{where}.content")
        beside = (value for name in REASONING if isinstance(value := message.get(name), str))
        reasoning = thoughts or read_text(next(filter(None, beside), ""), f"{where}.reasoning")
    weight = math.prod(read_weight(message.get(name), f"{where}.{name}") for name in WEIGHTS)
    return Turn(
        role=known, content=read_text(content, f"{where}.content"), reasoning=reasoning, weight=weight
    )


def _thoughts(content: object, where: str) -> tuple[str, object]:
    """Split the content into the text of its leading parts of type "thinking" and the rest."""
    if not isinstance(content, list):
        return "", content
    parts = list(takewhile(lambda part: isinstance(part, dict) and part.get("type") == "thinking", content))
    texts = (read_text(part.get("thinking"), f"{where}[{i}].thinking") for i, part in enumerate(parts))
    return "".join(texts), content[len(parts) :]


def read_weight(value: object, where: str) -> float:
    """Read a weight in the form of OpenAI (`weight`), axolotl (`train`) or ShareGPT (`loss`); null is 1.

    Raises:
        RowError: if it is neither true, false nor a number from 0 to 1.
    """
    if value is None:
        return 1.0
    if isinstance(value, (bool, int, float)) and 0 <= value <= 1:
        return float(value)
    wanted = f": its {where} is {reprlib.repr(value)}; it must be a number from 0 to 1, or true or false"
    raise RowError("it has a weight that cannot be used", wanted, about="weight")


def read_text(value: object, where: str) -> str:
    """Read a text, or OpenAI's list of text parts.

    Raises:
        RowError: if it is something else, or holds characters that are not Unicode.
    """
    if isinstance(value, list):
        value = "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(value))
    if not isinstance(value, str):
        raise RowError(
            "it holds something else than text", f": its {where} is {kind(value)}, not text", about="text"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        # fedmoe.data.records reads a byte that is not UTF-8 as such a surrogate.
        if 0xDC80 <= code <= 0xDCFF:
            raise RowError(
                "it is not UTF-8",
                f": its {where} holds the byte 0x{code - 0xDC00:02x}, which is not UTF-8 "
                "(Windows-1252 or Latin-1?); save the file as UTF-8",
                about="UTF-8",
            ) from None
        detail = f": its {where} holds half a character (\\u{code:04x}, a lone surrogate)"
        raise RowError("it holds half a character", detail, about="character") from None
    return value


def kind(value: object) -> str:
    """The type of a JSON value, in words."""
    return _KINDS.get(type(value), "a number")


def named(field: str) -> str:
    """A field's name as it is printed: quoted and cut off, because it may be long and hold anything."""
    return repr(field if len(field) <= MAX_NAME_CHARS else f"{field[:MAX_NAME_CHARS]}…")


def holds_something(value: object) -> bool:
    """False for null and for an empty text, list or object, which may be ignored without loss."""
    return value is not None and value not in ("", [], {})


def _part(part: object, where: str) -> str:
    """Text of one of OpenAI's content parts."""
    if isinstance(part, dict) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    what = f"a part of type {reprlib.repr(part.get('type'))}" if isinstance(part, dict) else kind(part)
    detail = f": its {where} is {what}; only parts of type 'text' can be trained on"
    raise RowError("it holds a part that is not text", detail, about="part")
