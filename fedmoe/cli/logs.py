"""`--log-format` and `--log-level` of the commands that run on and on."""

from collections.abc import Callable
from typing import Any

import click

from fedmoe.util.log import FORMATS, LEVELS, set_format, set_level

Command = Callable[..., Any]


def log_options(command: Command) -> Command:
    """Add both options. They take effect before other options are checked; the command does not get them."""
    for decorate in (
        _option("--log-level", LEVELS, set_level, "Level from which messages are logged.  [default: info]"),
        _option(
            "--log-format", FORMATS, set_format,
            "Form of the log: lines of text, or one JSON object a line for all output.  [default: text]",
        ),
    ):  # fmt: skip
        command = decorate(command)
    return command


def _option(name: str, choices: tuple[str, ...], use: Callable[[str], None], text: str) -> Any:
    def apply(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value is not None and not ctx.resilient_parsing:
            use(value)

    return click.option(
        name, type=click.Choice(choices), is_eager=True, expose_value=False, callback=apply, help=text,
        envvar=f"FEDMOE_{name.lstrip('-').replace('-', '_').upper()}", show_envvar=True,
    )  # fmt: skip
