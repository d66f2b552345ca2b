"""`fedmoe aggregator run`."""

from typing import TYPE_CHECKING, Any

import click

from fedmoe.cli.declared import given, made, options, redis_options
from fedmoe.cli.enrol import add_enrolment
from fedmoe.cli.logs import log_options
from fedmoe.protocol.rules import RuleSet
from fedmoe.settings import AggregatorSettings, GatewaySettings, IdentitySettings, RedisSettings
from fedmoe.tools.metrics.settings import MetricsSettings, check_installed
from fedmoe.util.alive import AliveSettings, alive

if TYPE_CHECKING:
    from consumers.metrics import AggregatorCollector
    from fedmoe.util.stopping import Stop

_REPLACED_BY_A_FIT = ("gateway_scale", "gateway_weights")


@click.group()
def aggregator() -> None:
    """Apply the updates of the workers to the experts, and merge the experts into the gateway."""


add_enrolment(aggregator, "aggregator")


@aggregator.command()
@redis_options
@click.option("--expert", "experts", multiple=True, metavar="NAME[=WEIGHT]", envvar="FEDMOE_AGGREGATOR_RUN_EXPERT",
              help="Expert to create if it does not exist, with its weight in the gateway; repeatable. The aggregator "
                   "serves all experts of the federation, also those added later.  "
                   "[default: python_expert, sql_expert, docs_expert, unless the federation has others]")  # fmt: skip
@options(IdentitySettings)
@options(RuleSet)
@options(GatewaySettings)
@options(AggregatorSettings)
@options(AliveSettings)
@options(MetricsSettings)
@log_options
@click.pass_context
def run(ctx: click.Context, /, redis: RedisSettings, **values: Any) -> None:
    """Create the experts that do not exist yet, then serve all experts of the federation until stopped.

    Several aggregators on the same Redis share the experts, and each takes over those of one that is gone.
    """
    from fedmoe.util.stopping import Stop, stop_on_signals

    file = made(AliveSettings, values).alive_file
    with stop_on_signals(stop := Stop()), alive(file, "aggregator"):
        _run(ctx, stop, redis, values)


def _run(ctx: click.Context, stop: "Stop", redis: RedisSettings, values: dict[str, Any]) -> None:
    import logging

    import torch

    from consumers.create import STOPPED, SpecRequest, ensure_experts, instead_of_defaults, parse_experts
    from consumers.daemon import Aggregator
    from fedmoe.errors import RedisUnavailableError, RedisUnfitError, StoppedError
    from fedmoe.protocol.formats import compiled
    from fedmoe.store.connection import Connection
    from fedmoe.store.permissions import AGGREGATOR
    from fedmoe.store.probe import eviction_warning
    from fedmoe.store.rights import require
    from fedmoe.util.backoff import Backoff
    from fedmoe.util.log import say
    from fedmoe.util.memory import keep_freed
    from fedmoe.util.template_file import read_template

    identity, typed = made(IdentitySettings, values), given(RuleSet, values)
    settings = made(AggregatorSettings, values)
    request = SpecRequest(
        base_model=identity.base_model,
        lora=identity.lora,
        rules=RuleSet().changed(typed),
        wire_format=identity.wire_format,
        seed=identity.seed,
        chat_template=read_template(identity.chat_template) if identity.chat_template else "",
        new_lineage=settings.new_lineage,
        weighted=frozenset(text.partition("=")[0] for text in values["experts"] if "=" in text),
        explicit=frozenset(typed)
        | {
            name
            for name in values
            if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
        },
    )
    weights = parse_experts(values["experts"])
    typed_weights = [
        f"--expert {name}={weights[name]:g}" for name in sorted(request.weighted) if weights[name]
    ]
    typed_options = [f"--{name.replace('_', '-')}" for name in _REPLACED_BY_A_FIT if values[name] is not None]
    gateway = made(GatewaySettings, values, weights_given=(*typed_options, *typed_weights))
    collector = _metrics(made(MetricsSettings, values), settings)
    torch.set_num_threads(
        1
    )  # a fold takes a millisecond, but threads that wait for the next one spin and occupy whole cores
    compiled()  # now, and not while the first update waits
    # Parts reuse freed memory, those of an update of 153 MiB (20 in int4) too; that of weights goes back to the system.
    keep_freed(blocks_mib=4, free_mib=32, heaps=4)
    stop.last_words = lambda: (STOPPED, 0)
    logger = logging.getLogger(__name__)
    backoff = Backoff("aggregator", logger)
    connection = Connection(redis)
    stop.when_out_of_patience.append(connection.cut_off)
    while not stop.is_set():
        try:
            require(connection, AGGREGATOR, list(weights))
            if not values["experts"]:
                weights = instead_of_defaults(connection) or weights
            ensure_experts(connection, weights, request, stop=stop)
            if threat := eviction_warning(connection):
                logger.warning("%s", threat)
            break
        except StoppedError as stopped:
            say(str(stopped))
            return
        except RedisUnavailableError as error:
            if stop.is_set():
                return
            if not settings.wait or isinstance(error, RedisUnfitError):
                raise
            stop.wait(backoff.failed(error))
    if stop.is_set():
        return
    daemon = Aggregator(redis, list(weights), settings, gateway, holder=holder_name())
    if collector is not None:
        collector.daemon = daemon
    stop.when_out_of_patience.append(daemon.cut_off)
    stop.patience_s, stop.end_s = 2.0, 1.5  # time for a commit that has begun to finish
    stop.last_words = lambda: (
        "stopped; updates that were read but not decided stay in Redis for the next aggregator",
        0,
    )
    daemon.run(stop)


def _metrics(metrics: MetricsSettings, settings: AggregatorSettings) -> "AggregatorCollector | None":
    if metrics.port is None:
        return None
    check_installed()
    from consumers.metrics import AggregatorCollector
    from fedmoe.tools.metrics.server import serve_process

    collector = AggregatorCollector(settings.keep_updates)
    serve_process(metrics, collector)
    return collector


def holder_name() -> str:
    """A unique name for this process: host, pid and four random hex digits."""
    import os
    import secrets
    import socket

    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
