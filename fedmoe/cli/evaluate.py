"""`fedmoe evaluate`: the loss of base model, experts and gateway on held-out rows."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fedmoe.cli.declared import made, options, redis_options
from fedmoe.settings import HeldOutSettings, RedisSettings


@click.command()
@redis_options
@click.option("--data", required=True, multiple=True, metavar="DIR|EXPERT=FILE",
              help="Directory with <expert>.test.jsonl or <expert>.jsonl files, or one file; repeatable.")  # fmt: skip
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    envvar="FEDMOE_EVALUATE_ADAPTER",
    metavar="NAME=DIR",
    help="Adapter to evaluate beside those of the federation; repeatable.",
)
@click.option("--train", multiple=True, metavar="DIR|EXPERT=FILE",
              help="Directory with <expert>.train.jsonl or <expert>.jsonl files, or one file, of rows to train the "
              "centralised adapter on; repeatable.")  # fmt: skip
@click.option(
    "--plot",
    "plot_file",
    metavar="FILE",
    envvar="FEDMOE_EVALUATE_PLOT",
    help="PNG file to draw the table into.",
)
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    envvar="FEDMOE_EVALUATE_JSON",
    help="File to write the result to as JSON; - prints JSON instead of the table.",
)
@options(HeldOutSettings)
def evaluate(
    redis: RedisSettings,
    data: Sequence[str],
    adapters: Sequence[str],
    train: Sequence[str],
    plot_file: str | None,
    json_file: str | None,
    **values: Any,
) -> None:
    """Print the held-out loss of the base model, each expert and the gateway on each domain; lower is better.

    The loss is the cross entropy per token of the answers. A star marks the best model of each column. The row
    `routed` is each domain's own expert on its domain, and `share` the part of its gain over the base model.
    """
    extra = _parse_adapters(adapters)
    wanted = made(HeldOutSettings, values, data=data, extra=extra, train=train)
    _check_files(json_file, plot_file)
    from fedmoe.protocol.federation import plain_json
    from fedmoe.store.connection import Connection
    from fedmoe.store.gateway import GatewayStore
    from fedmoe.tools.heldout import measure
    from fedmoe.tools.plot import plot_losses
    from fedmoe.tools.share import format_table, table_rows
    from fedmoe.util.disk import write_whole
    from producers.centralised import train as trainer

    measured = measure(
        GatewayStore(Connection(redis)), wanted,
        report=lambda line: click.echo(line, err=True), train=trainer if wanted.centralised else None,
    )  # fmt: skip
    text = json.dumps(plain_json(measured), indent=2) + "\n"
    if json_file == "-":
        click.echo(text, nl=False)
    else:
        click.echo(format_table(measured.loss, measured.routed, measured.share))
    if json_file not in (None, "-"):
        file = Path(json_file)
        if file.exists() and not file.is_file():  # a pipe or a device
            file.write_text(text)
        else:
            write_whole(file.resolve(), text.encode())  # a link stays one
    if plot_file is not None:
        rows = table_rows(measured.loss, measured.routed, measured.share)
        plot_losses(Path(plot_file), rows, measured.share)


def _parse_adapters(texts: Sequence[str]) -> dict[str, Path]:
    from fedmoe.errors import SettingsError

    found: dict[str, Path] = {}
    for name, directory in map(_parse_adapter, texts):
        if name in found:
            raise SettingsError(f"--adapter has the name {name!r} twice: give each its own", about="adapter")
        found[name] = directory
    return found


def _parse_adapter(text: str) -> tuple[str, Path]:
    from fedmoe.errors import SettingsError
    from fedmoe.protocol.names import check_name

    name, equals, directory = text.partition("=")
    if not equals:
        raise SettingsError(f"--adapter {text!r} must be NAME=DIR", about="adapter")
    return check_name("adapter", name), Path(directory)


def _check_files(json_file: str | None, plot_file: str | None) -> None:
    """Fail early, before minutes are spent on a result that cannot be written."""
    if json_file not in (None, "-"):
        _check_writable("json", Path(json_file))
    if plot_file is not None:
        from fedmoe.errors import SettingsError
        from fedmoe.tools.plot import pyplot

        if Path(plot_file).suffix.lower() != ".png":
            raise SettingsError(
                f"--plot {plot_file} does not end in .png, and the plot is a PNG file: name it {plot_file}.png",
                about="plot",
            )
        _check_writable("plot", Path(plot_file))
        pyplot()


def _check_writable(option: str, file: Path) -> None:
    from fedmoe.errors import SettingsError

    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise SettingsError(
            f"--{option} {file} cannot be written: choose a file in a directory you may write to",
            about=option,
        )
