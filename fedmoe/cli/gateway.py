"""`fedmoe gateway export | show`; `fit`, `follow`, `serve` and `chat` have modules of their own."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedmoe.cli.declared import redis_options
from fedmoe.cli.fit import fit
from fedmoe.cli.follow import follow
from fedmoe.cli.merge_lines import merge_lines, method_lines
from fedmoe.cli.serve import chat, serve
from fedmoe.cli.status import merged_line, trained_line
from fedmoe.settings import RedisSettings

if TYPE_CHECKING:
    from consumers.gateway.compare import Compared
    from fedmoe.protocol.merged_view import MergedView
    from fedmoe.store.connection import Connection
    from fedmoe.tools.export import Export


@click.group()
def gateway() -> None:
    """Export, fit, follow, serve or show the gateway, the model that knows all domains."""


for one in (fit, follow, serve, chat):
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
    dtype: str | None,
    merged: bool,
    base_model: str,
    base_name: str,
    no_tokenizer: bool,
    router: str | None,
    leave_out: Sequence[str],
    force: bool,
) -> None:
    """Write the gateway, or one expert, as an adapter that PeftModel.from_pretrained loads, or as a whole model."""
    from fedmoe.errors import SettingsError
    from fedmoe.store.connection import Connection
    from fedmoe.store.gateway import GatewayStore
    from fedmoe.tools.card import vllm_hint
    from fedmoe.tools.export import read_expert, read_gateway
    from fedmoe.tools.export_files import write
    from fedmoe.tools.shape import with_tokenizer

    if expert and kind:
        raise SettingsError("--kind is about the gateway: leave it out, or leave out --expert", about="kind")
    if merged and (no_tokenizer or base_name):
        raise SettingsError(
            "a whole model has its tokenizer and names no base model: leave out --no-tokenizer and --base-name",
            about="merged",
        )
    if no_tokenizer and base_model:
        raise SettingsError(
            "--base-model says where the tokenizer is, and --no-tokenizer leaves it out: leave out one of the two",
            about="base_model",
        )
    if router and expert:
        raise SettingsError("--router chooses among the experts: leave out --expert", about="router")
    if leave_out and not router:
        raise SettingsError("--leave-out is for --router only: add that, or leave it out", about="leave_out")
    if merged and router:
        raise SettingsError(
            "a router chooses among adapters, and --merged writes a whole model: leave one of them out",
            about="router",
        )
    store = GatewayStore(Connection(redis))
    adapter = read_expert(store, expert) if expert else read_gateway(store, kind or "")
    if adapter.templates_differ:
        click.echo(
            f"{adapter.name}: its experts were trained with different chat templates ({', '.join(adapter.metas)}), so "
            "it has the base model's own; an expert (--expert) has its own",
            err=True,
        )
    # The base model takes the values in fp32 (--merged), and the type is that of the whole model.
    shape = partial(_shaped, rank=rank, dtype=None if merged else dtype, base_name=base_name)
    adapter = shape(adapter)
    if merged:
        from fedmoe.tools.whole_model import write_model

        size = write_model(
            out, adapter, base_model=base_model, dtype=dtype or "", force=force, report=click.echo
        )
        click.echo(
            f"{out}: {adapter.name} as a whole model ({size / 2**20:.1f} MiB), built from {adapter.versions}"
        )
    else:
        if not no_tokenizer:
            adapter, without = with_tokenizer(adapter, base_model)
            if without:
                click.echo(f"without tokenizer: {without}", err=True)
        if router:
            from fedmoe.tools.router import read_for_export, write_router

            whole = read_for_export(
                store, router, adapter,
                leave_out=leave_out, shape=shape, report=lambda line: click.echo(line, err=True),
            )  # fmt: skip
            warning = write_router(out, whole, force=force)
            click.echo(f"{out}: routes by {router} among {whole.summary}; python {out / 'load.py'} PROMPT")
        else:
            warning = write(out, adapter, force=force)
            if not warning and (out / "router.json").exists():
                warning = (
                    f"{out} also holds the router of an earlier export (load.py, experts/), which stays as it was: "
                    "export with --router to renew it"
                )
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


def _shaped(adapter: "Export", *, rank: int | None, dtype: str | None, base_name: str) -> "Export":
    """The adapter as the options want it; what --rank changes is printed."""
    from fedmoe.tools.shape import as_bf16, with_base_name

    if rank is not None:
        from consumers.gateway.rank import at_rank

        adapter, text = at_rank(adapter, rank)
        click.echo(text)
    if dtype == "bf16":
        adapter = as_bf16(adapter)
    return with_base_name(adapter, base_name) if base_name else adapter


@gateway.command()
@redis_options
@click.option("--no-compare", is_flag=True, envvar="FEDMOE_GATEWAY_SHOW_NO_COMPARE",
              help="Leave out the errors of the other methods, for which all experts are read and merged.")  # fmt: skip
@click.option(
    "--json", "as_json", is_flag=True, envvar="FEDMOE_GATEWAY_SHOW_JSON", help="Print JSON, for a program."
)
def show(redis: RedisSettings, no_compare: bool, as_json: bool) -> None:
    """Show the trained gateway's version, how the merged gateway was built and fitted, and each merge method's error.

    The error is the distance of the merged product from the exact weighted sum of the experts, relative to that sum.
    """
    from fedmoe.protocol.federation import findings
    from fedmoe.protocol.merged_view import MERGED
    from fedmoe.protocol.names import GATEWAY
    from fedmoe.store.connection import Connection
    from fedmoe.store.inspect import Inspector

    connection = Connection(redis)
    federation = Inspector(connection).federation()
    merged = federation.merged
    compared = None if no_compare or not merged.exists else _compared(connection, merged)
    if as_json:
        content = federation.to_dict()
        trained = next((one for one in content["experts"] if one["name"] == GATEWAY), None)
        shown = {"trained": trained, "merged": content["merged"]}
        if isinstance(compared, list):
            shown["methods"] = [one._asdict() for one in compared]
        click.echo(json.dumps(shown, indent=2))
        return
    for line in (
        trained_line(federation),
        merged_line(merged),
        *merge_lines(merged),
        *method_lines(merged, compared),
    ):
        click.echo(line)
    for line in findings(federation):
        if line.startswith((f"{MERGED}: ", f"{GATEWAY}: ")):
            click.echo(f"! {line}")


def _compared(connection: "Connection", merged: "MergedView") -> "list[Compared] | str":
    """The merge methods on the present experts, with the weights in force; or why they cannot be compared."""
    from consumers.gateway.compare import compare_present
    from fedmoe.errors import FedMoEError
    from fedmoe.store.gateway import GatewayStore

    if not merged.weights:
        return "the weights are unknown, because an earlier release built it"
    try:
        return compare_present(GatewayStore(connection), merged.weights)
    except FedMoEError as error:
        return str(error)
