"""Renders docs/settings.md from the commands themselves: `python -m fedmoe.cli.page > docs/settings.md`."""

import re
from typing import Any

import click

from fedmoe.cli.config import commands, default_of, options_of
from fedmoe.cli.main import cli

_SAID = re.compile(r"\s*\[default: .*\]$")
HEAD = """# Settings

Rendered from the commands by `python -m fedmoe.cli.page`; a test holds this page equal to them.

Every option can be given on the command line, by environment variable, or in a TOML file (`--config FILE` or
`FEDMOE_CONFIG`). The command line wins over the environment, the environment over the file.

| | `fedmoe aggregator run --max-norm 50` |
| --- | --- |
| environment | `FEDMOE_AGGREGATOR_RUN_MAX_NORM=50` |
| file | `max_norm = 50` in the section `[aggregator.run]` |

`FEDMOE_REDIS` and `FEDMOE_PREFIX` apply to all commands that have these options, and so do `redis` and `prefix` at the
top of the file. The rules to change with `fedmoe expert set` can be named on the command line only.
`fedmoe config show` prints every setting, its value and its source; `fedmoe config check FILE` checks the names and the
types in a file.
"""


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD]
    root = click.Context(cli, info_name="fedmoe", auto_envvar_prefix="FEDMOE")
    for words, context in commands(root):
        command, line = context.command, f"fedmoe {' '.join(words)}"
        rows = [
            f"| {_spelled(option)} | {_cell(default_of(option))} | {_cell(_SAID.sub('', option.help or ''))} |"
            for option in options_of(command).values()
        ]
        about = " ".join((command.help or "").split("\n\n")[0].split())
        table = "\n".join(["| option | default | |", "| --- | --- | --- |", *rows]) + "\n"
        parts.append(f"## `{line}`\n\n{about}\n" + (f"\n{table}" if rows else ""))
    return "\n".join(parts)


def _spelled(option: click.Option) -> str:
    name = max(option.opts, key=len)
    if option.is_flag:
        return f"`{name}`"
    if isinstance(option.type, click.Choice):
        return f"`{name}` {', '.join(f'`{one}`' for one in option.type.choices)}"
    return f"`{name} {option.metavar or _metavar(option.type)}`".replace("|", "\\|")


def _metavar(kind: click.ParamType[Any]) -> str:
    if isinstance(kind, click.types.IntParamType | click.types.FloatParamType):
        return "N"
    return "PATH" if isinstance(kind, click.Path) else "TEXT"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    click.echo(page(), nl=False)
