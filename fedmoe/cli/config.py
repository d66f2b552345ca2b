"""The configuration file, and `fedmoe config show | check`: every setting, its value and its source."""

import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from fedmoe.errors import SettingsError
from fedmoe.util.text import printable

# Keys at the top of the file, for all commands that have them.
SHARED = ("redis", "prefix", "enrolment", "log_format", "log_level")
_SECRET = re.compile(r"(^|_)(key|password|secret|token)$")  # options whose values are not shown
_DEFAULT = re.compile(r"\s*\[default: (.*)\]$")
Section = dict[str, Any]


def read_config(path: Path, ctx: click.Context) -> Section:
    """Read the file as click's default_map; check names and types, because click ignores or converts wrong ones.

    Raises:
        SettingsError: with the file, the section, the key and what is wrong with it.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingsError(
            f"cannot read the configuration {path}: {error.strerror}", about="config"
        ) from error
    except (ValueError, RecursionError) as error:  # ValueError also for a number of five thousand digits
        raise SettingsError(f"the configuration {path} is not TOML: {error}", about="TOML") from error
    shared = {key: value for key, value in content.items() if not isinstance(value, dict)}
    if odd := sorted(shared.keys() - set(SHARED)):
        raise SettingsError(
            f"{path}: unknown key {odd[0]!r}; at the top there can be {', '.join(SHARED)} only",
            about=odd[0],
        )
    for key, value in shared.items():
        if not isinstance(value, str):
            raise SettingsError(
                f"{path}: {key} must be a text in quotes", about=key
            )  # without the value: it may hold a password
    root = ctx.find_root().command
    assert isinstance(root, click.Group)
    sections = {key: value for key, value in content.items() if isinstance(value, dict)}
    return _defaults(root, ctx, sections, shared, str(path))


def _defaults(
    group: click.Group, ctx: click.Context, sections: Section, shared: Section, where: str
) -> Section:
    """Check the sections of a group and add the shared keys to each command that has them."""
    if odd := sorted(sections.keys() - set(group.list_commands(ctx))):
        raise SettingsError(f"{where}: there is no command for the section or key {odd[0]!r}", about=odd[0])
    defaults: Section = {}
    for name in group.list_commands(ctx):
        command, section = group.get_command(ctx, name), sections.get(name, {})
        here = f"{where} [{name}]"
        if not isinstance(section, dict):
            raise SettingsError(
                f"{where}: {name!r} is a command: its settings are a section of their own", about=name
            )
        if isinstance(command, click.Group):
            defaults[name] = _defaults(command, ctx, section, shared, here)
        elif command is not None:
            options = {spelling(one): one for one in command.params if isinstance(one, click.Option)}
            given = {key.replace("-", "_"): value for key, value in section.items()}
            if len(given) < len(section):
                raise SettingsError(f"{here}: a key appears twice, with - and with _", about=name)
            if odd := sorted(given.keys() - options.keys()):
                raise SettingsError(
                    f"{here}: unknown key {odd[0]!r}; there are {', '.join(sorted(options))}", about=odd[0]
                )
            for key, value in given.items():
                _check_type(options[key], value, ctx, f"{here}: {key}")
            known = {key: value for key, value in shared.items() if key in options}
            for key, value in known.items():
                _check_type(options[key], value, ctx, f"{here.partition(' [')[0]}: {key}")
            if "redis" in given:  # the section says how to reach Redis
                known.pop("enrolment", None)
            if "enrolment" in given:
                known.pop("redis", None)
            defaults[name] = {str(options[key].name): value for key, value in (known | given).items()}
    return defaults


def spelling(option: click.Option) -> str:
    """The key of an option in the file: its longest name without the leading dashes, and with `_` for `-`."""
    return max(option.opts, key=len).lstrip("-").replace("-", "_")


def _check_type(option: click.Option, value: Any, ctx: click.Context, where: str) -> None:
    """Raise SettingsError unless the option takes this value of the file."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise SettingsError(f"{where} must be true or false, not {value!r}", about=spelling(option))
        return
    if option.multiple:
        if not isinstance(value, list):
            raise SettingsError(
                f"{where} must be a list, like [{value!r}], not {value!r}", about=spelling(option)
            )
        values = value
    else:
        values = [value]
    for one in values:
        if isinstance(option.type, click.types.IntParamType):
            is_right, what = isinstance(one, int) and not isinstance(one, bool), "a whole number"
        elif isinstance(option.type, click.types.FloatParamType):
            is_right, what = _is_number(one), "a number"
        elif hasattr(option.type, "word"):
            is_right, what = _is_number(one) or isinstance(one, str), "a number or a word"
        else:
            is_right, what = isinstance(one, str), "a text in quotes"
        if not is_right:
            came = "" if option.name == "redis" else f", not {one!r}"  # a URL may hold a password
            raise SettingsError(f"{where} must be {what}{came}", about=spelling(option))
        if isinstance(option.type, click.Path) and not one:
            raise SettingsError(f"{where} must not be empty", about=spelling(option))
        try:
            option.type.convert(one, option, ctx)
        except click.BadParameter as error:
            raise SettingsError(f"{where}: {error.message}", about=spelling(option)) from error
        except OverflowError as error:
            raise SettingsError(f"{where} is a number that is too large", about=spelling(option)) from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@click.group()
def config() -> None:
    """Show the settings and their sources, and check a configuration file."""


@config.command()
@click.argument("command", nargs=-1)
@click.pass_context
def show(ctx: click.Context, /, command: Sequence[str]) -> None:
    """Print every setting of COMMAND (like `aggregator run`; all commands without one), its value and its source.

    The source is the environment, the configuration file or the default; the command line overrides them all.
    """
    shown = 0
    for words, one in commands(ctx.find_root()):
        if words[: len(command)] != tuple(command) or words[0] == "config":
            continue
        shown += 1
        click.echo(f"[{'.'.join(words)}]")
        rows = [(name, *_effective(option, one)) for name, option in options_of(one.command).items()]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)] if rows else [0, 0]
        for name, value, source in rows:
            click.echo(f"  {name:{widths[0]}}  {value:{widths[1]}}  {source}")
    if not shown:
        raise SettingsError(
            f"there is no command {' '.join(command)!r}: see `fedmoe --help`", about="command"
        )


@config.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_context
def check(ctx: click.Context, /, file: Path) -> None:
    """Check the names and types of all settings in the configuration FILE. Exit code 2 if one is wrong."""
    read_config(file, ctx)
    click.echo(f"{file}: all names and types are right")


def commands(root: click.Context) -> Iterator[tuple[tuple[str, ...], click.Context]]:
    """Every command that is no group: its words, and a context in which its settings have their values."""
    assert isinstance(root.command, click.Group)
    for name in root.command.list_commands(root):
        command = root.command.get_command(root, name)
        assert command is not None
        context = click.Context(command, parent=root, info_name=name)
        if isinstance(command, click.Group):
            for words, one in commands(context):
                yield (name, *words), one
        else:
            yield (name,), context


def options_of(command: click.Command) -> dict[str, click.Option]:
    """The options of a command by their keys in the file; --help is left out."""
    return {spelling(one): one for one in command.params if isinstance(one, click.Option)}


def default_of(option: click.Option) -> str:
    """The default as text: the words in the help, else the value; "" if there is none."""
    if said := _DEFAULT.search(option.help or ""):
        return said[1]
    value = option.default
    if option.is_flag:
        return "on" if value is True else "off"
    return str(value) if isinstance(value, str | int | float | Path) else ""


def _effective(option: click.Option, ctx: click.Context) -> tuple[str, str]:
    value, source = option.consume_value(ctx, {})
    match source:
        case click.core.ParameterSource.ENVIRONMENT:
            if not option.multiple:
                option.type_cast_value(ctx, value)  # raises BadParameter for a wrong value
            names = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
            names.append(f"{ctx.auto_envvar_prefix}_{option.name}".upper())
            where = f"environment {next((name for name in names if os.environ.get(name)), names[0])}"
        case click.core.ParameterSource.DEFAULT_MAP:
            where = "configuration file"
        case _:
            return (default_of(option) or "-", "default")
    return _shown(option, value), where


def _shown(option: click.Option, value: Any) -> str:
    if option.name == "redis":
        from fedmoe.store.url import shown

        return printable(shown(str(value)), None)
    if _SECRET.search(str(option.name)):
        return "(a secret)"
    return printable(" ".join(map(str, value)) if isinstance(value, list | tuple) else str(value), None)
