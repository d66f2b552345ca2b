"""Command-line options from declared settings (`fedmoe.util.setting`), and settings from the options given."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from fedmoe.cli.options import Duration
from fedmoe.settings import RedisSettings
from fedmoe.util.setting import Declared, declared

Command = Callable[..., Any]
T = TypeVar("T")


class NumberOrWord(click.ParamType[Any]):
    """A number, or a word that stands for None."""

    def __init__(self, kind: type, word: str) -> None:
        self.name = f"{'N' if kind is int else 'X'}|{word}"
        self._kind, self.word = kind, word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number or the word."""
        if value == self.word:
            return value
        try:
            number = self._kind(value)
            if number == float(value):
                return number
        except (ValueError, OverflowError):
            pass
        what = "a whole number" if self._kind is int else "a number"
        return self.fail(f"{value!r} must be {what}, or {self.word}", param, ctx)


class Names(click.ParamType[tuple[str, ...]]):
    """Names separated by commas, as a tuple."""

    name = "names"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Return the names without the spaces around them."""
        if isinstance(value, tuple):
            return value
        return tuple(name.strip() for name in str(value).split(",") if name.strip())


def options(owner: type, *, show_defaults: bool = True) -> Callable[[Command], Command]:
    """Add an option for each setting of a class; `show_defaults` puts the defaults into the help.

    An option that is not given is None, so that the default is written in one place only.
    """

    def decorate(command: Command) -> Command:
        for one in reversed(list(declared(owner))):
            command = click.option(_flag(one), **_parameters(one, show_default=show_defaults))(command)
        return command

    return decorate


def key(one: Declared) -> str:
    """The name of the option's parameter; a flag that is on by default gets the option --no-NAME."""
    return f"no_{one.name}" if one.default is True else one.name


def _flag(one: Declared) -> str:
    return f"--{key(one).replace('_', '-')}"


def _parameters(one: Declared, *, show_default: bool) -> dict[str, Any]:
    said = one.said
    if one.kind is bool:
        return {
            "is_flag": True,
            "default": None,
            "help": said.help,
            "envvar": said.variable or None,
            "show_envvar": bool(said.variable),
        }
    kind: Any = str
    if said.choices:
        kind = click.Choice(said.choices)
    elif said.none and one.number:
        kind = NumberOrWord(one.number, said.none)
    elif said.is_duration:
        kind = Duration()
    elif one.number:
        kind = one.number
    elif one.is_path:
        kind = click.Path(path_type=Path)
    elif one.is_list:
        kind = Names()
    return {
        "envvar": said.variable or None,
        "show_envvar": bool(said.variable),
        "type": kind,
        # To click a default of None is a value, with which no option is missing.
        **({"required": True} if one.is_required else {"default": None}),
        "metavar": said.metavar or ("TIME" if said.is_duration else kind.name if said.none else None),
        "help": said.help + (f"  [default: {shown}]" if show_default and (shown := _default(one)) else ""),
    }


def _default(one: Declared) -> str:
    """The default, as the help shows it."""
    if one.said.default or one.is_required:
        return one.said.default
    if one.default is None:
        return one.said.none
    return ", ".join(one.default) if one.is_list else str(one.default)


def given(owner: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a class that were given, by the names of their options."""
    found = {one.name: _value(one, values) for one in declared(owner)}
    return {name: value for name, value in found.items() if value is not None}


def _value(one: Declared, values: Mapping[str, Any]) -> Any:
    value = values[key(one)]
    return not value if one.default is True and value is not None else value


def made(owner: type[T], values: Mapping[str, Any], **more: Any) -> T:
    """An instance from the settings that were given, and defaults for the others; `more` holds fields without option.

    Raises:
        SettingsError: if a value breaks its bound.
    """
    assert is_dataclass(owner)
    found = dict(more)
    for one in fields(owner):
        if (said := one.metadata.get("setting")) is not None:
            value = _value(Declared(said.option or one.name, one.type, one.default, said), values)
            if value is not None:
                found[one.name] = value
        elif isinstance(one.type, type) and is_dataclass(one.type):
            found[one.name] = made(one.type, values)
    return owner(**found)


def redis_options(command: Command) -> Command:
    """Add the options of `RedisSettings`; the command gets them as one argument, `redis`."""

    @functools.wraps(command)
    def with_settings(*args: Any, **values: Any) -> Any:
        names = {key(one) for one in declared(RedisSettings)}
        redis = made(RedisSettings, values)
        return command(*args, redis=redis, **{k: v for k, v in values.items() if k not in names})

    return options(RedisSettings)(with_settings)
