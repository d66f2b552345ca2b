"""`fedmoe gateway export` and `fedmoe gateway show`."""

import json
from collections.abc import Sequence
from pathlib import Path

import click

from fedmoe.cli.declared import redis_options
from fedmoe.settings import RedisSettings


@click.group()
def gateway() -> None:
    """Export or show the gateway, the model that knows all domains."""


@gateway.command()
@redis_options
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Directory to write the adapter to."
)
@click.option("--expert", metavar="NAME", help="Export this expert instead of the gateway.")
@click.option("--kind", type=click.Choice(["trained", "merged"]),
              help="Gateway to export: the one that workers train, or the merge of the experts.  "
                   "[default: trained, if workers trained it]")  # fmt: skip
@click.option("--rank", type=click.IntRange(min=1), metavar="N",
              help="Truncate the adapter to this rank if its own is higher, and print the relative error.  "
                   "[default: keep its rank]")  # fmt: skip
@click.option("--router", type=click.Choice(["domain", "arrow"]),
              help="Write the experts beside the gateway, with a script that answers each prompt with the expert whose "
                   "domain vector is nearest (domain), or routes each token with peft's arrow.")  # fmt: skip
@click.option(
    "--leave-out", multiple=True, metavar="EXPERT", help="Expert that the router leaves out; repeatable."
)
@click.option("--force", is_flag=True, help="Write even if the directory holds something else.")
def export(
    redis: RedisSettings,
    out: Path,
    expert: str | None,
    kind: str | None,
    rank: int | None,
    router: str | None,
    leave_out: Sequence[str],
    force: bool,
) -> None:
    """Write the gateway, or one expert, as an adapter that PeftModel.from_pretrained loads."""
    from fedmoe.errors import SettingsError
    from fedmoe.store.connection import Connection
    from fedmoe.store.gateway import GatewayStore
    from fedmoe.tools.export import read_expert, read_gateway, vllm_hint, write

    if expert and kind:
        raise SettingsError("--kind is about the gateway: leave it out, or leave out --expert", about="kind")
    if router and expert:
        raise SettingsError("--router chooses among the experts: leave out --expert", about="router")
    if leave_out and not router:
        raise SettingsError("--leave-out is for --router only: add that, or leave it out", about="leave_out")
    store = GatewayStore(Connection(redis))
    adapter = read_expert(store, expert) if expert else read_gateway(store, kind or "")
    if rank is not None:
        from consumers.gateway.truncate import truncate_to_rank

        adapter, text = truncate_to_rank(adapter, rank)
        click.echo(text)
    if router:
        from fedmoe.tools.router import read_for_export, write_router

        whole = read_for_export(
            store, router, adapter, leave_out=leave_out, report=lambda line: click.echo(line, err=True)
        )
        warning = write_router(out, whole, force=force)
        click.echo(f"{out}: routes by {router} among {whole.summary}; python {out / 'load.py'} PROMPT")
    else:
        warning = write(out, adapter, force=force)
    size = f"rank {adapter.config.get('r')}, {len(adapter.file) / 2**20:.1f} MiB"
    click.echo(f"{out}: {adapter.name} ({size}), built from {adapter.versions}")
    if hint := vllm_hint(int(adapter.config["r"])):
        click.echo(hint)
    if warning:
        click.echo(warning, err=True)
    if adapter.behind:
        now = ", ".join(f"{name} is at v{version}" for name, version in adapter.behind.items())
        click.echo(
            f"this merged gateway is not the newest: {now}; export again after it was rebuilt", err=True
        )


@gateway.command()
@redis_options
@click.option(
    "--json", "as_json", is_flag=True, envvar="FEDMOE_GATEWAY_SHOW_JSON", help="Print JSON, for a program."
)
def show(redis: RedisSettings, as_json: bool) -> None:
    """Show the trained gateway's version, and how the merged gateway was built, and from which versions."""
    from fedmoe.cli.status import merged_line, trained_line
    from fedmoe.protocol.federation import MERGED, findings
    from fedmoe.protocol.names import GATEWAY
    from fedmoe.store.connection import Connection
    from fedmoe.store.inspect import Inspector

    federation = Inspector(Connection(redis)).federation()
    if as_json:
        content = federation.to_dict()
        trained = next((one for one in content["experts"] if one["name"] == GATEWAY), None)
        click.echo(json.dumps({"trained": trained, "merged": content["merged"]}, indent=2))
        return
    click.echo(trained_line(federation))
    click.echo(merged_line(federation.merged))
    if federation.merged.relative_error is not None:
        click.echo(f"truncated to this rank, relative error {federation.merged.relative_error:.2%}")
    for line in findings(federation):
        if line.startswith((f"{MERGED}: ", f"{GATEWAY}: ")):
            click.echo(f"! {line}")
