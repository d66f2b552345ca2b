"""`fedmoe gateway export` and `fedmoe gateway show`; `follow`, `serve` and `chat` have modules of their own."""

import json
from pathlib import Path

import click

from fedmoe.cli.declared import redis_options
from fedmoe.cli.follow import follow
from fedmoe.cli.serve import chat, serve
from fedmoe.settings import RedisSettings


@click.group()
def gateway() -> None:
    """Export, follow, serve or show the gateway, the model that knows all domains."""


for one in (follow, serve, chat):
    gateway.add_command(one)


@gateway.command()
@redis_options
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Directory to write the adapter to."
)
@click.option("--expert", metavar="NAME", help="Export this expert instead of the gateway.")
@click.option("--kind", type=click.Choice(["trained", "merged"]),
              help="Gateway to export: the one that workers train, or the merge of the experts.  "
                   "[default: trained, if workers trained it]")  # fmt: skip
@click.option("--rank", type=click.IntRange(min=1, max=4096), metavar="N",
              help="Rank of the adapter: a higher one is padded with zeros, which is exact; a lower one is truncated, "
                   "and the relative error printed.  [default: keep its rank]")  # fmt: skip
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]),
              help="Type of the values; bf16 halves an adapter's size.  "
                   "[default: fp32; with --merged the base model's own]")  # fmt: skip
@click.option("--merged", is_flag=True,
              help="Write a whole model, with the adapter merged into the base model's weights, for programs that "
                   "take no adapter.")  # fmt: skip
@click.option("--base-model", default="", metavar="TEXT",
              help="Hub id or local directory of the base model, for its tokenizer and for --merged.  "
                   "[default: as the spec says]")  # fmt: skip
@click.option("--base-name", default="", metavar="TEXT",
              help="Name of the base model to write into adapter_config.json: the one under which a server serves it.  "
                   "[default: as the spec says]")  # fmt: skip
@click.option("--no-tokenizer", is_flag=True, help="Leave the tokenizer out.")
@click.option("--force", is_flag=True, help="Write even if the directory holds something else.")
def export(
    redis: RedisSettings,
    out: Path,
    expert: str | None,
    kind: str | None,
    rank: int | None,
    dtype: str | None,
    merged: bool,
    base_model: str,
    base_name: str,
    no_tokenizer: bool,
    force: bool,
) -> None:
    """Write the gateway, or one expert, as an adapter that PeftModel.from_pretrained loads, or as a whole model."""
    from fedmoe.errors import SettingsError
    from fedmoe.store.connection import Connection
    from fedmoe.store.gateway import GatewayStore
    from fedmoe.tools.card import vllm_hint
    from fedmoe.tools.export import read_expert, read_gateway
    from fedmoe.tools.export_files import write
    from fedmoe.tools.shape import as_bf16, with_base_name, with_tokenizer

    if expert and kind:
        raise SettingsError("--kind is about the gateway: leave it out, or leave out --expert", about="kind")
    if merged and (no_tokenizer or base_name):
        raise SettingsError(
            "a whole model has its tokenizer and names no base model: leave out --no-tokenizer and --base-name",
            about="merged",
        )
    store = GatewayStore(Connection(redis))
    adapter = read_expert(store, expert) if expert else read_gateway(store, kind or "")
    if rank is not None:
        from consumers.gateway.rank import at_rank

        adapter, text = at_rank(adapter, rank)
        click.echo(text)
    if merged:
        from fedmoe.tools.whole_model import write_model

        size = write_model(
            out, adapter, base_model=base_model, dtype=dtype or "", force=force, report=click.echo
        )
        click.echo(
            f"{out}: {adapter.name} as a whole model ({size / 2**20:.1f} MiB), built from {adapter.versions}"
        )
    else:
        if dtype == "bf16":
            adapter = as_bf16(adapter)
        if base_name:
            adapter = with_base_name(adapter, base_name)
        if not no_tokenizer:
            adapter, without = with_tokenizer(adapter, base_model)
            if without:
                click.echo(f"without tokenizer: {without}", err=True)
        warning = write(out, adapter, force=force)
        size_text = f"rank {adapter.config.get('r')}, {adapter.dtype}, {len(adapter.file) / 2**20:.1f} MiB"
        click.echo(f"{out}: {adapter.name} ({size_text}), built from {adapter.versions}")
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
