"""Declares a setting completely in one line. Pure.

    lr: float = setting(1.0, "Aggregator's step size: expert += lr × decay × Δ.", above=0)

is a field of a frozen dataclass. It defines the command-line option, the key of the TOML file, the environment
variable, the check of the value, and the line in docs/settings.md. An expert's settings are declared in
`fedmoe.protocol` (`rules`, `staleness`, `lora`), all others in `fedmoe.settings`.
"""

import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from fedmoe.errors import SettingsError

T = TypeVar("T")
UNITS = {"s": "seconds", "ms": "milliseconds"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The description of a setting: everything except name, type and default value.

    Args:
        help: one sentence that begins with a noun or a verb.
        unit: of a number: s, ms, updates, rows, tokens, steps.
        option: name of the option, if it differs from the field's: `decay_a` for the field `a`.
        above, at_least, at_most: bounds of a number.
        choices: allowed texts.
        none: the text for None, like `auto`.
        default: the default in words, if its value does not explain it.
        metavar: placeholder of the option's value in help texts.
        is_duration: the value is typed with its unit, like 30m.
        variable: one environment variable for all commands with this setting, if there is one.
    """

    help: str
    unit: str = ""
    option: str = ""
    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    none: str = ""
    default: str = ""
    metavar: str = ""
    is_duration: bool = False
    variable: str = ""


def setting(value: Any, text: str, *, words: str = "", **more: Any) -> Any:
    """A dataclass field with default `value` (`...`: required) and help `text`.

    `words` is `Setting.default`; for `more` see `Setting`.
    """
    said = Setting(help=text, default=words, **more)
    return (
        field(metadata={"setting": said})
        if value is ...
        else field(default=value, metadata={"setting": said})
    )


@dataclass(frozen=True, slots=True)
class Declared:
    """A setting as its class declares it: option name, type, default (MISSING: required) and description."""

    name: str
    kind: Any
    default: Any
    said: Setting

    @property
    def is_required(self) -> bool:
        """True if there is no default."""
        return self.default is MISSING

    @property
    def number(self) -> type | None:
        """The type `int` or `float` if the setting is a number, else None."""
        kinds = get_args(self.kind) if get_origin(self.kind) in (Union, types.UnionType) else (self.kind,)
        return next((kind for kind in (float, int) if kind in kinds), None)

    @property
    def is_list(self) -> bool:
        """True for a comma-separated list of texts."""
        return get_origin(self.kind) is tuple

    @property
    def is_path(self) -> bool:
        """True for a file or a directory."""
        return Path in (self.kind, *get_args(self.kind))


def declared(owner: Any) -> Iterator[Declared]:
    """The settings of a class and of the dataclasses nested in it, in declared order."""
    for one in fields(owner):
        if (said := one.metadata.get("setting")) is not None:
            yield Declared(said.option or one.name, one.type, one.default, said)
        elif is_dataclass(one.type):
            yield from declared(one.type)


def values(owner: Any) -> dict[str, Any]:
    """The values of an instance by option name; None is replaced by the text for it."""
    found: dict[str, Any] = {}
    for one in fields(owner):
        value = getattr(owner, one.name)
        if (said := one.metadata.get("setting")) is not None:
            found[said.option or one.name] = said.none if value is None and said.none else value
        elif is_dataclass(value):
            found |= values(value)
    return found


def changed(owner: T, wanted: Mapping[str, Any]) -> T:
    """A copy of the instance with the `wanted` values, named as in `values`; unknown names are ignored."""
    new: dict[str, Any] = {}
    for one in fields(owner):  # type: ignore[arg-type]  # an instance of a dataclass
        value = getattr(owner, one.name)
        said = one.metadata.get("setting")
        if said is None:
            if is_dataclass(value):
                new[one.name] = changed(value, wanted)
        elif (name := said.option or one.name) in wanted:
            new[one.name] = None if said.none and wanted[name] == said.none else wanted[name]
    return replace(owner, **new)  # type: ignore[type-var]  # an instance of a dataclass


def check(owner: Any) -> None:
    """Raise SettingsError, with name, bound and value, for the first value that breaks its bound."""
    for one in fields(owner):
        said: Setting | None = one.metadata.get("setting")
        value = getattr(owner, one.name)
        if said is None or (value is None and one.default is None):
            continue
        which = Declared(said.option or one.name, one.type, one.default, said)
        if said.choices and value not in said.choices:
            raise SettingsError(
                f"{which.name} must be one of {', '.join(said.choices)}, not {value!r}", about=which.name
            )
        if which.number and not _is_within(value, which):
            raise SettingsError(f"{which.name} must be {bounds(which)}, not {value!r}", about=which.name)


def check_whole(name: str, value: object, *, at_least: int) -> None:
    """Raise SettingsError unless `value` is a whole number of at least `at_least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise SettingsError(
            f"{name} must be a whole number of at least {at_least}, not {value!r}", about=name
        )


def _is_within(value: Any, which: Declared) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if which.number is int else int | float):
        return False
    said = which.said
    return (
        (isinstance(value, int) or math.isfinite(value))
        and (said.above is None or value > said.above)
        and (said.at_least is None or value >= said.at_least)
        and (said.at_most is None or value <= said.at_most)
    )


def bounds(which: Declared) -> str:
    """The bounds of a number, for people: `a whole number of at least 1 and at most 9 (rows)`."""
    said = which.said
    limits = [
        f"{word} {limit:,g}" if limit < 1e6 else f"{word} {limit:,.0f}"
        for word, limit in (("above", said.above), ("of at least", said.at_least), ("at most", said.at_most))
        if limit is not None
    ]
    text = "a whole number" if which.number is int else "a number"
    unit = f" ({UNITS.get(said.unit, said.unit)})" if said.unit else ""
    return f"{text} {' and '.join(limits)}".strip() + unit
