"""`fedmoe evaluate`: how well base, experts and gateway do on rows that were held out."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

from fedmoe.cli.options import bad_rows_option, learn_option, redis_options, redis_settings


@click.command()
@redis_options
@click.option("--data", required=True, multiple=True, metavar="DIR|EXPERT=FILE",
              help="A directory with <expert>.test.jsonl or <expert>.jsonl, or a file; repeatable.")  # fmt: skip
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    envvar="FEDMOE_EVALUATE_ADAPTER",
    metavar="NAME=DIR",
    help="Another adapter; repeatable.",
)
@click.option(
    "--rows",
    type=click.IntRange(min=0),
    default=0,
    help="Number of rows of each file to look at.  [default: all]",
)
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    envvar="FEDMOE_EVALUATE_JSON",
    help="Write the result there too; - is standard output.",
)
@learn_option
@bad_rows_option
@click.option("--base-model", default="", help="Where the base model lies here.  [default: as the spec says]")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Rows at a time."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True,
              help="auto: bf16 where the hardware has it.")  # fmt: skip
def evaluate(
    redis: str,
    prefix: str,
    redis_timeout: float,
    data: Sequence[str],
    adapters: Sequence[str],
    rows: int,
    learn: Literal["all", "last"],
    bad_rows: Path | None,
    json_file: str | None,
    base_model: str,
    batch_size: int,
    device: str,
    precision: str,
) -> None:
    """Held-out loss of the base, each expert and the gateway on each domain, as a table; lower is better.

    The loss is the cross entropy per token of the answers. A star marks the best of each column.
    """
    settings = redis_settings(redis, prefix, redis_timeout)
    extra = dict(map(_parse_adapter, adapters))
    if json_file not in (None, "-"):
        _check_writable(Path(json_file))
    from fedmoe.protocol.federation import plain_json
    from fedmoe.store.connection import Connection
    from fedmoe.store.gateway import GatewayStore
    from fedmoe.tools.evaluate import format_table
    from fedmoe.tools.heldout import HeldOutSettings, measure

    wanted = HeldOutSettings(
        data=data,
        extra=extra,
        base_model=base_model,
        rows=rows,
        learn=learn,
        bad_rows=bad_rows,
        batch_size=batch_size,
        device=device,
        precision=precision,
    )
    store = GatewayStore(Connection(settings))
    measured = measure(store, wanted, report=lambda line: click.echo(line, err=True))
    text = json.dumps(plain_json(measured), indent=2) + "\n"
    if json_file == "-":
        click.echo(text, nl=False)
        return
    click.echo(format_table(measured.loss))
    if json_file is not None:
        Path(json_file).write_text(text, encoding="utf-8")


def _parse_adapter(text: str) -> tuple[str, Path]:
    from fedmoe.errors import SettingsError
    from fedmoe.protocol.names import check_name

    name, equals, directory = text.partition("=")
    if not equals:
        raise SettingsError(f"--adapter {text!r} must be name=directory")
    return check_name("adapter", name), Path(directory)


def _check_writable(file: Path) -> None:
    """Before minutes are spent on what could not be kept."""
    from fedmoe.errors import SettingsError

    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise SettingsError(f"--json {file} cannot be written: choose a file in a directory you may write to")
