"""Requests for a chat completion, as OpenAI's API has them, and where an answer ends. Pure.

No field is dropped without a word: those that would change an answer are refused, also those that are not known here,
and the few that do not are named in the answer's header X-FedMoE-Ignored.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmoe.errors import RequestError, RowError

_NOTHING: tuple[Any, ...] = (None, "", [], {})  # an answer that a client sends back has such fields
ROLES = ("system", "developer", "user", "assistant")
MAX_STOPS = 4
# Each would change the answer: the value that a client may send all the same, because it means "without".
_WITHOUT: dict[str, tuple[Any, ...]] = {
    "tools": (None, []), "functions": (None, []), "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}), "logprobs": (None, False), "top_logprobs": (None, 0), "n": (None, 1),
    "logit_bias": (None, {}), "presence_penalty": (None, 0), "frequency_penalty": (None, 0),
    "modalities": (None, ["text"]), "function_call": (None, "none", "auto"),
}  # fmt: skip
_USED = frozenset({
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "seed", "stream",
    "stream_options",
})  # fmt: skip
# These say who asks and how a server keeps or bills it; without tools the last one says nothing.
IGNORED = frozenset({
    "user", "safety_identifier", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "parallel_tool_calls",
})  # fmt: skip
_OF_PART = ("cache_control", "prompt_cache_breakpoint")  # the same of a part of a message


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A request for one answer.

    Args:
        model: name of the gateway, an expert or the base model.
        messages: the conversation; each has the texts `role` and `content`.
        max_tokens: of the answer, None for the server's own limit.
        temperature, top_p: of the sampling, None for the base model's own; temperature 0 takes the likeliest token.
        stop: texts that end the answer.
        seed: of the sampling.
        stream, include_usage: how the answer is sent.
        ignored: fields of the request that are not used.
    """

    model: str
    messages: tuple[Mapping[str, str], ...]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    ignored: tuple[str, ...] = ()


def read_request(content: Any) -> ChatRequest:
    """Read the JSON of a request.

    Raises:
        RequestError: if a field is missing, malformed or not supported; `about` names it.
    """
    if not isinstance(content, dict):
        raise RequestError("the request must be a JSON object", about="body")
    _refuse_unknown(content)
    model, messages = content.get("model"), content.get("messages")
    if not isinstance(model, str) or not model:
        raise RequestError("model must be the name of a model; GET /v1/models lists them", about="model")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of at least one message", about="messages")
    limits = {name: _number(content, name, int, 1, 2**31) for name in ("max_completion_tokens", "max_tokens")}
    limit = next((value for value in limits.values() if value is not None), None)
    return ChatRequest(
        model=model,
        messages=tuple(map(_message, messages)),
        max_tokens=limit,
        temperature=_number(content, "temperature", float, 0, 2),
        top_p=_number(content, "top_p", float, 0, 1),
        stop=_stops(content.get("stop")),
        seed=_number(content, "seed", int, -(2**63), 2**63 - 1),
        stream=_flag(content, "stream"),
        include_usage=_include_usage(content.get("stream_options")),
        ignored=(
            *sorted(name for name in IGNORED if content.get(name) is not None),
            *(name for name, value in limits.items() if value not in (None, limit)),
            *["messages[].name"] * any(message.get("name") for message in messages),
            *(f"messages[].content[].{name}" for name in _OF_PART if any(map(_has(name), messages))),
        ),
    )


def refused_by_template(error: RowError) -> RequestError:
    """The error of a request whose messages the chat template refuses, or of which it drops one."""
    did = "refuses these messages" if error.about == "chat_template" else f"drops the {error.about} message"
    return RequestError(f"the chat template {did}{str(error).removeprefix(error.kind)}", about="messages")


def _refuse_unknown(content: Mapping[str, Any]) -> None:
    """Raise RequestError if a field would change the answer and cannot."""
    for name, value in content.items():
        if name in _USED or name in IGNORED:
            continue
        if value not in _WITHOUT.get(name, (None,)):
            raise RequestError(f"{name} is not supported here: leave it out", about=name)


def _flag(content: Mapping[str, Any], name: str) -> bool:
    value = content.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false", about=name)
    return bool(value)


def _include_usage(options: Any) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise RequestError("stream_options must be an object with include_usage only", about="stream_options")
    if _flag(options, "include_obfuscation"):
        raise RequestError("include_obfuscation is not supported here: leave it out", about="stream_options")
    return _flag(options, "include_usage")


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise RequestError(f"a message needs a role, one of {', '.join(ROLES)}", about="messages")
    for name, value in message.items():
        if name not in ("role", "content", "name") and value not in _NOTHING:
            raise RequestError(
                f"the {name} of a message is not supported here: leave it out", about="messages"
            )
    role = "system" if message["role"] == "developer" else str(message["role"])
    return {"role": role, "content": _text(message.get("content"))}


def _text(content: Any) -> str:
    """The text of a message: a text, or a list of parts of type text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        for name, value in (field for part in content for field in part.items()):
            if name not in ("type", "text", *_OF_PART) and value not in _NOTHING:
                raise RequestError(
                    f"the {name} of a part of a message is not supported here: leave it out", about="messages"
                )
        return "".join(part["text"] for part in content)
    raise RequestError("the content of a message must be text", about="messages")


def _has(name: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a part of a message, which has been read, has this field."""
    return lambda message: (
        isinstance(message["content"], list)
        and any(part.get(name) is not None for part in message["content"])
    )


def _number(content: Mapping[str, Any], name: str, kind: type, low: float, high: float) -> Any:
    value = content.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise RequestError(f"{name} must be {what} between {low} and {high}", about=name)
    return kind(value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(s, str) and s for s in stops)
    ):
        raise RequestError(f"stop must be a text, or a list of at most {MAX_STOPS} texts", about="stop")
    return tuple(stops)


class StopCutter:
    """Cuts a text that comes in pieces before the stop text that is complete first; of two at once, the longer one.

    The end of a piece that may begin a stop text is held back until the next piece decides.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.is_done = False

    def cut(self, piece: str, *, is_last: bool = False) -> str:
        """What of the text so far can be sent now."""
        if self.is_done:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_done, self._held = True, ""
            return text[: min(found)[1]]
        kept = 0 if is_last else max((self._beginning(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """How many of the text's last characters are the first of `stop`."""
        longest = min(len(stop) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Reply:
    """The JSON of one answer, whole or in chunks; `version` says which version answered (`system_fingerprint`)."""

    def __init__(self, answer_id: str, model: str, version: str) -> None:
        self._common = {
            "id": answer_id,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": version,
        }

    def whole(self, text: str, finish_reason: str, usage: Mapping[str, int]) -> dict[str, Any]:
        """A `chat.completion`."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
        return self._common | {"object": "chat.completion", "choices": [choice], "usage": dict(usage)}

    def chunk(self, delta: Mapping[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        """A `chat.completion.chunk`."""
        choice = {"index": 0, "delta": dict(delta), "finish_reason": finish_reason, "logprobs": None}
        return self._common | {"object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The last chunk, if a request asks for the usage."""
        return self._common | {"object": "chat.completion.chunk", "choices": [], "usage": dict(usage)}
