"""`fedmoe gateway fit`."""

import json
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from fedmoe.cli.declared import made, options, redis_options
from fedmoe.settings import FitSettings, RedisSettings

if TYPE_CHECKING:
    from fedmoe.store.gateway import GatewayStore


@click.command()
@redis_options
@click.option("--data", multiple=True, metavar="DIR|FILE|EXPERT=FILE",
              help="Directory with <expert>.valid.jsonl files, or one file, of validation rows: public or pooled text, "
              "never test rows; repeatable.")  # fmt: skip
@click.option(
    "--remove", is_flag=True, help="Give up the fit, so that the aggregator's settings apply again."
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the fit as JSON, for a program; with --remove, whether there was one.",
)
@options(FitSettings)
@click.pass_context
def fit(
    ctx: click.Context,
    /,
    redis: RedisSettings,
    data: Sequence[str],
    remove: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Fit the experts' weights in the merged gateway on validation rows, and write them to Redis.

    The weights with the lowest loss replace the gateway weights and the scale; the aggregator rebuilds the merged
    gateway with them within seconds, or minutes if they are large. It leaves out experts that the fit does not name.
    """
    from fedmoe.errors import SettingsError
    from fedmoe.store.connection import Connection
    from fedmoe.store.gateway import GatewayStore

    if remove:
        _check_alone(ctx, ("data", *values))
        had = _remove(GatewayStore(Connection(redis)))
        if as_json:
            click.echo(json.dumps({"removed": had}))
        else:
            click.echo("the fit is given up" if had else "there was no fit")
        return
    if not data:
        raise SettingsError(
            "--data is missing: name validation rows, for example --data EXPERT=FILE", about="data"
        )
    settings = made(FitSettings, values, data=data)
    store = GatewayStore(Connection(redis))
    from consumers.gateway.fit import fit_gateway
    from fedmoe.cli.merge_lines import losses_text
    from fedmoe.protocol.merged_view import weights_line

    done = fit_gateway(store, settings, report=lambda line: click.echo(line, err=True))
    if as_json:
        parts: dict[str, Any] = {"weights": done.by_expert, "loss": done.loss, "before": done.losses_before}
        parts["fitted_on"] = {name: one._asdict() for name, one in done.experts.items()}
        parts["rows"] = {name: one.rows for name, one in done.rows.items()}
        click.echo(json.dumps(parts, indent=2))
        return
    click.echo(f"fitted: {losses_text(done.loss, done.losses_before)}")
    click.echo(f"weights: {weights_line(done.by_expert)}")
    click.echo("written; the aggregator rebuilds the merged gateway with these weights")


def _check_alone(ctx: click.Context, names: Iterable[str]) -> None:
    """Raise SettingsError if one of these options stands beside --remove on the command line."""
    from fedmoe.errors import SettingsError

    typed = [n for n in names if ctx.get_parameter_source(n) is click.core.ParameterSource.COMMANDLINE]
    if typed:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in typed)
        raise SettingsError(
            f"--remove fits nothing, so {shown} would have no effect: leave that out, or leave out --remove",
            about="remove",
        )


def _remove(store: "GatewayStore") -> bool:
    """Give up the fit; False if there was none. An aggregator that remembers one does not put it back then."""
    from fedmoe.errors import SettingsError
    from fedmoe.protocol.fit import Fit
    from fedmoe.util.software import software

    had = store.fit()
    if had is None and not store.listed():
        connection = store.connection
        raise SettingsError(
            f"there is no federation {connection.keys.prefix!r} at {connection.settings.shown}: name that of "
            "yours (--prefix)",
            about="prefix",
        )
    store.write_fit(Fit(fitted_at=round(time.time(), 3), software=software()))
    return bool(had and had.weights)
