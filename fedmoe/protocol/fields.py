"""Records that can grow: one class writes and reads a record, whichever release wrote it. Pure.

A record is a frozen dataclass of texts and numbers. When it is read,

    a field                       must be present; its default serves only code that makes a record
    a field that is `optional`    may be missing: an earlier release did not write it, or it was empty
    a field that the class lacks  was written by a later release, and is left alone
    `requires`                    names the features needed to read the record correctly (see fedmoe.protocol.features)

So a release adds an optional field, and names a feature in `requires` only if an earlier release would misread the
record without it.
"""

import json
import math
import types
from collections.abc import Mapping
from dataclasses import Field, field, fields
from typing import Any, TypeVar, Union, get_args, get_origin

Record = TypeVar("Record")


def optional(default: Any, *, exact: bool = False) -> Any:
    """A field that may be missing; `exact` as in the function of that name."""
    return field(default=default, metadata={"optional": True, "exact": exact})


def exact() -> Any:
    """A float field that is written with all its digits; other floats are written with six."""
    return field(metadata={"exact": True})


def to_text(record: Any, *, sparse: bool = False) -> dict[str, str]:
    """The fields of a record as Redis stores them, without None; sparse: also without optional fields at default."""
    return {
        one.name: _text(value, one)
        for one in fields(record)
        if (value := getattr(record, one.name)) is not None
        and not (sparse and one.metadata.get("optional") and value == one.default)
    }


def changed(record: Any, before: Any) -> dict[str, str]:
    """The fields of a record, as `to_text` gives them, whose values differ from those of `before`, of its class."""
    return {
        one.name: _text(value, one)
        for one in fields(record)
        if (value := getattr(record, one.name)) is not (old := getattr(before, one.name))
        and value is not None
        and value != old
    }


def from_text(record: type[Record], raw: Mapping[Any, bytes | str]) -> Record:
    """Read what `to_text` wrote.

    Raises:
        KeyError: if a field that is not optional is missing.
        ValueError: if a value is not of its field's type, or not UTF-8.
    """
    found = _by_name(raw)
    return record(
        **{
            one.name: _parse(one, _decoded(found[one.name], errors="strict"))
            for one in fields(record)  # type: ignore[arg-type]  # every record is a dataclass
            if one.name in found or not one.metadata.get("optional")
        }
    )


def from_untrusted(record: type[Record], raw: Mapping[Any, bytes | str | None]) -> Record:
    """Read an untrusted record: a value that is not of its field's type counts as missing.

    Every field of `record` needs a default.
    """
    content: dict[str, Any] = {}
    found = _by_name({name: value for name, value in raw.items() if value is not None})
    for one in fields(record):  # type: ignore[arg-type]  # every record is a dataclass
        if one.name in found:
            try:
                content[one.name] = _parse(one, _decoded(found[one.name], errors="backslashreplace"))
            except ValueError:
                continue
    return record(**content)


def known_fields(record: type, content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a JSON object that the record has; a later release may have written more."""
    names = {one.name for one in fields(record)}
    return {name: value for name, value in content.items() if name in names}


def from_json(record: type[Record], text: str, name: str) -> Record:
    """Read a record whose fields are texts and whole numbers from the JSON object in the field `name` of meta.

    Fields that are missing have their default. Raises ValueError if it is malformed.
    """
    try:
        found = record(**known_fields(record, json.loads(text)))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{name} is {text!r}") from error
    kinds = {one.name: one.type for one in fields(record)}  # type: ignore[arg-type]  # every record is a dataclass
    if any(type(getattr(found, name)) is not kind for name, kind in kinds.items()):
        raise ValueError(f"{name} is {text!r}")
    return found


def take_unknown(record: type, content: dict[str, Any]) -> dict[str, Any]:
    """Remove the fields that the record lacks, which a later FedMoE wrote, from a JSON object, and return them."""
    names = {one.name for one in fields(record)} - {"unknown"}
    return {name: content.pop(name) for name in sorted(content.keys() - names)}


def put_back(content: dict[str, Any], more: dict[str, Any]) -> None:
    """Put the fields that `take_unknown` removed back into a JSON object, also into nested objects."""
    for name, value in more.items():
        if name in content:
            put_back(content[name], value)
        else:
            content[name] = value


def number(raw: bytes | str | None) -> float | None:
    """A finite number, or None."""
    try:
        value = float(raw or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def whole(raw: bytes | str | None) -> int | None:
    """A number of absolute value at most 2^53, truncated to an integer, or None."""
    value = number(raw)
    return None if value is None or abs(value) > 2**53 else int(value)


def _by_name(raw: Mapping[Any, Any]) -> dict[str, Any]:
    return {_decoded(name, errors="backslashreplace"): value for name, value in raw.items()}


def _decoded(text: bytes | str, *, errors: str) -> str:
    return text.decode(errors=errors) if isinstance(text, bytes) else str(text)


def _text(value: Any, one: "Field[Any]") -> str:
    if hasattr(value, "to_json"):
        return str(value.to_json())
    if not isinstance(value, float):
        return str(value)
    return repr(value) if one.metadata.get("exact") or abs(value) >= 1e6 else f"{value:.6g}"


def _parse(one: "Field[Any]", text: str) -> Any:
    """The value of a field. `int | None` and `float | None` take only a finite number that fits, else ValueError."""
    kind = one.type
    if get_origin(kind) in (Union, types.UnionType):
        number_of = whole if int in get_args(kind) else number
        if (value := number_of(text)) is None:
            raise ValueError(f"{one.name} is {text!r}")
        return value
    if hasattr(kind, "from_json"):
        return kind.from_json(text)
    assert kind in (str, int, float), kind
    return kind(text)
