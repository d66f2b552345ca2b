"""`fedmoe aggregator run`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedmoe.cli.options import Duration, redis_options, redis_settings
from fedmoe.cli.rules import given_rules, rules_options

if TYPE_CHECKING:
    from fedmoe.stopping import Stop


@click.group()
def aggregator() -> None:
    """Apply what workers publish to the experts, and merge the experts into the gateway."""


@aggregator.command()
@redis_options
@click.option("--expert", "experts", multiple=True, metavar="NAME[=WEIGHT]", envvar="FEDMOE_AGGREGATOR_RUN_EXPERT",
              help="An expert to create if need be, with its weight in the gateway; repeatable. All experts of the "
                   "federation are served, also those added later.  "
                   "[default: python_expert, sql_expert, docs_expert]")  # fmt: skip
@click.option("--base-model", default="Qwen/Qwen2.5-0.5B-Instruct", show_default=True,
              help="Hub id or directory; only its config is needed here.")  # fmt: skip
@click.option("--rank", type=int, default=16, show_default=True, help="LoRA rank.")
@click.option("--alpha", type=float, default=32.0, show_default=True, help="LoRA alpha.")
@click.option(
    "--targets", default="all-linear", show_default=True, help="Modules with an adapter, comma separated."
)
@click.option("--chat-template", type=click.Path(path_type=Path), metavar="FILE",
              help="Jinja chat template that all workers format their rows with.  "
                   "[default: the base model's own]")  # fmt: skip
@click.option("--wire-format", type=click.Choice(["fp32", "bf16", "int8", "int4"]), default="int4", show_default=True,
              help="How updates and pulls travel.")  # fmt: skip
@rules_options(show_defaults=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the experts' common initialisation.")
@click.option("--gateway-method", type=click.Choice(["cat", "svd", "average", "ties", "dare"]), default="cat",
              show_default=True, help="How the experts are merged.")  # fmt: skip
@click.option("--gateway-scale", type=float, default=1.0, show_default=True, help="Sum of the merge weights.")
@click.option("--gateway-weights", type=click.Choice(["config", "examples", "updates"]), default="config",
              show_default=True, help="What an expert weighs.")  # fmt: skip
@click.option("--gateway-rank", type=int, default=0, help="Of the svd merge.  [default: the experts' rank]")
@click.option(
    "--gateway-interval", type=float, default=2.0, show_default=True, help="Seconds between rebuilds."
)
@click.option(
    "--lease", type=float, default=5.0, show_default=True, help="Seconds until a standby takes over."
)
@click.option("--block-ms", type=int, default=500, show_default=True, help="Longest wait of a read.")
@click.option("--batch", type=int, default=64, show_default=True, help="Updates a commit takes at most.")
@click.option(
    "--keep-updates", type=click.Path(path_type=Path), help="Keep applied updates here, for `fedmoe verify`."
)
@click.option("--keep-updates-for", type=Duration(), metavar="TIME",
              help="Time after which kept updates are removed, like 7d, 12h or 30m; `fedmoe verify` then replays from "
                   "the weights of a later version.  [default: they are kept for ever]")  # fmt: skip
@click.option("--new-lineage", is_flag=True, help="Create experts from zero that Redis has lost or an operator "
              "removed: what their workers trained before is forgotten.")  # fmt: skip
@click.option("--burst", is_flag=True, help="End when nothing is waiting.")
@click.option("--max-updates", type=int, default=0, help="End after so many decided updates.")
@click.option("--no-wait", is_flag=True, help="Fail if Redis cannot be reached, instead of waiting for it.")
@click.pass_context
def run(ctx: click.Context, /, **options: Any) -> None:
    """Create the experts that do not exist yet, then serve all experts of the federation until stopped.

    A second aggregator on the same Redis is a hot standby.
    """
    from fedmoe.stopping import Stop, stop_on_signals

    with stop_on_signals(stop := Stop()):
        _run(ctx, stop, options)


def _run(ctx: click.Context, stop: "Stop", options: dict[str, Any]) -> None:
    import logging

    import torch

    from consumers.aggregator import AggregatorSettings
    from consumers.create import STOPPED, SpecRequest, ensure_experts, parse_experts
    from consumers.daemon import Aggregator
    from consumers.gateway import GatewaySettings
    from fedmoe.backoff import Backoff
    from fedmoe.errors import RedisUnavailableError, RedisUnfitError, StoppedError
    from fedmoe.memory import keep_freed
    from fedmoe.rules import RuleSet
    from fedmoe.spec import LoraSettings
    from fedmoe.store.connection import Connection
    from fedmoe.store.permissions import AGGREGATOR
    from fedmoe.store.probe import eviction_warning
    from fedmoe.store.rights import require
    from fedmoe.template_file import read_template

    redis = redis_settings(options["redis"], options["prefix"], options["redis_timeout"])
    typed = given_rules(options)
    request = SpecRequest(
        base_model=options["base_model"],
        lora=LoraSettings(
            rank=options["rank"],
            alpha=options["alpha"],
            targets=tuple(t.strip() for t in options["targets"].split(",") if t.strip()),
        ),
        rules=RuleSet().changed(typed),
        wire_format=options["wire_format"],
        seed=options["seed"],
        chat_template=read_template(options["chat_template"]) if options["chat_template"] else "",
        new_lineage=options["new_lineage"],
        weighted=frozenset(text.partition("=")[0] for text in options["experts"] if "=" in text),
        explicit=frozenset(typed)
        | {
            name
            for name in options
            if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
        },
    )
    settings = AggregatorSettings(
        lease_s=options["lease"],
        block_ms=options["block_ms"],
        batch=options["batch"],
        keep_updates=options["keep_updates"],
        keep_updates_for_s=options["keep_updates_for"] or 0.0,
        burst=options["burst"],
        max_updates=options["max_updates"],
    )
    gateway = GatewaySettings(
        method=options["gateway_method"],
        scale=options["gateway_scale"],
        weighting=options["gateway_weights"],
        rank=options["gateway_rank"],
        interval_s=options["gateway_interval"],
    )
    weights = parse_experts(options["experts"])
    torch.set_num_threads(
        1
    )  # a fold takes a millisecond; threads that spin in wait for the next take whole cores
    keep_freed(
        blocks_mib=4, free_mib=8, heaps=4
    )  # parts (1 MiB) are read into used memory, weights are given back
    stop.last_words = lambda: (STOPPED, 0)
    logger = logging.getLogger(__name__)
    backoff = Backoff("aggregator", logger)
    connection = Connection(redis)
    stop.when_out_of_patience.append(connection.cut_off)
    while not stop.is_set():
        try:
            require(connection, AGGREGATOR, list(weights))
            ensure_experts(connection, weights, request, stop=stop)
            if threat := eviction_warning(connection):
                logger.warning("%s", threat)
            break
        except StoppedError as stopped:
            click.echo(str(stopped))
            return
        except RedisUnavailableError as error:
            if stop.is_set():
                return
            if options["no_wait"] or isinstance(error, RedisUnfitError):
                raise
            stop.wait(backoff.failed(error))
    if stop.is_set():
        return
    daemon = Aggregator(redis, list(weights), settings, gateway, holder=holder_name())
    stop.when_out_of_patience.append(daemon.cut_off)
    stop.patience_s, stop.end_s = 2.0, 1.5  # a commit that is under way may come to its end
    stop.last_words = lambda: (
        "stopped; updates that were read but not applied stay in Redis for the next aggregator",
        0,
    )
    daemon.run(stop)


def holder_name() -> str:
    """A name for this process that nobody else has: host, pid and four random hex digits."""
    import os
    import secrets
    import socket

    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
