"""`fedmoe gateway follow`."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedmoe.cli.declared import redis_options
from fedmoe.cli.logs import log_options
from fedmoe.cli.options import Duration
from fedmoe.settings import RedisSettings

if TYPE_CHECKING:
    from fedmoe.util.stopping import Stop


@click.command()
@redis_options
@click.option("--dir", "directory", required=True, type=click.Path(path_type=Path),
              help="Directory for the versions, each in its own directory (without a tokenizer), and a link to the "
                   "served one.")  # fmt: skip
@click.option(
    "--vllm",
    metavar="URL",
    help="Address of a vLLM that serves the base model, for example http://127.0.0.1:8000.",
)
@click.option("--sglang", metavar="URL", help="Address of an SGLang that serves the base model.")
@click.option("--run", "command", metavar="CMD",
              help="Shell command to run for each version, named by FEDMOE_NAME and FEDMOE_DIR; if it ends with 0, the "
                   "version is served.")  # fmt: skip
@click.option("--api-key", metavar="TEXT", help="Key that the server asks for (bearer token).")
@click.option("--kind", type=click.Choice(["trained", "merged"]),
              help="Gateway to follow: the one that workers train, or the merge of the experts.  "
                   "[default: trained, if workers trained it]")  # fmt: skip
@click.option("--name", default="gateway", show_default=True, metavar="NAME",
              help="Beginning of the names under which versions are served: NAME-v12-3fa9c1e0.")  # fmt: skip
@click.option("--base-name", default="", metavar="TEXT",
              help="Name of the base model to write into adapter_config.json: the one under which a server serves it.  "
                   "[default: as the spec says]")  # fmt: skip
@click.option("--rank", type=click.IntRange(min=1, max=4096), metavar="N",
              help="Rank of the adapters, as of `fedmoe gateway export`.  [default: keep their rank]")  # fmt: skip
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True,
              help="Type of the values; bf16 halves an adapter's size.")  # fmt: skip
@click.option("--min-gain", type=click.FloatRange(min=0), metavar="X",
              help="Fall of the validation loss, in nats per token, below which a version is not served.  "
                   "[default: serve what is no worse]")  # fmt: skip
@click.option("--data", multiple=True, metavar="DIR|EXPERT=FILE",
              help="Held-out rows to measure the validation loss on, as of `fedmoe evaluate`; repeatable.  "
                   "[default: the loss that the workers measure, where they do]")  # fmt: skip
@click.option("--base-model", default="", metavar="TEXT",
              help="Hub id or local directory of the base model, for --data.  [default: as the spec says]")  # fmt: skip
@click.option("--keep", type=click.IntRange(min=1), default=3, show_default=True, metavar="N",
              help="Number of versions whose directories stay.")  # fmt: skip
@click.option("--interval", type=Duration(), default="5s", show_default=True, metavar="TIME",
              help="Time between two looks at Redis and the server, like 5s.")  # fmt: skip
@click.option("--once", is_flag=True, help="Bring directory and server up to date once, then end.")
@log_options
def follow(redis: RedisSettings, **values: Any) -> None:
    """Export every new version of the gateway, and let a running server serve it in place of the one before.

    A version is served under a name of its own, and never if its validation loss is worse than the served one's.
    Another gateway than the served one (trained or merged, or created again) is served only if both losses are known.
    """
    from fedmoe.util.stopping import Stop, stop_on_signals

    with stop_on_signals(stop := Stop()):
        _follow(stop, redis, values)


def _follow(stop: "Stop", redis: RedisSettings, values: dict[str, Any]) -> None:
    from fedmoe.errors import FedMoEError, SettingsError
    from fedmoe.protocol.names import check_name
    from fedmoe.store.connection import Connection
    from fedmoe.store.gateway import GatewayStore
    from fedmoe.tools.export import Export
    from fedmoe.tools.follow.directory import VersionDirectory
    from fedmoe.tools.follow.follower import Follower, FollowSettings
    from fedmoe.tools.follow.servers import AdapterServer
    from fedmoe.tools.shape import as_bf16, with_base_name

    given = [name for name in ("vllm", "sglang", "command") if values[name]]
    if len(given) > 1:
        raise SettingsError("give one of --vllm, --sglang and --run, or none", about=given[1])
    if values["api_key"] and not (values["vllm"] or values["sglang"]):
        raise SettingsError(
            "--api-key is for a server only: add --vllm or --sglang, or leave it out", about="api_key"
        )
    if values["base_model"] and not values["data"]:
        raise SettingsError(
            "--base-model is for --data only: add that, or leave it out (--base-name names the base model in the "
            "adapters)",
            about="base_model",
        )
    rank, dtype, base_name = values["rank"], values["dtype"], values["base_name"]
    changed = {"rank": rank, "dtype": "" if dtype == "fp32" else dtype, "base_name": base_name}
    settings = FollowSettings(
        kind=values["kind"] or "",
        name=check_name("name", values["name"]),
        options=" ".join(f"{option}={value}" for option, value in changed.items() if value),
        min_gain=values["min_gain"],
        keep=values["keep"],
        interval_s=values["interval"],
        command=values["command"] or "",
    )
    server = next(
        (
            AdapterServer(kind, values[kind], api_key=values["api_key"] or "")
            for kind in ("vllm", "sglang")
            if values[kind]
        ),
        None,
    )

    def shape(export: Export) -> Export:
        if rank is not None:
            from consumers.gateway.rank import at_rank

            export, _ = at_rank(export, rank)
        if dtype == "bf16":
            export = as_bf16(export)
        return with_base_name(export, base_name) if base_name else export

    stop.last_words = lambda: ("stopped", 0)
    connection = Connection(redis)
    stop.when_asked.append(connection.cut_off)
    store = GatewayStore(connection)
    judge = None
    if values["data"]:
        judge = _judge(store, values["data"], values["base_model"], once=values["once"])
    directory = VersionDirectory(values["directory"], settings.name)
    try:
        follower = Follower(store, directory, settings, server=server, shape=shape, judge=judge)
        done = follower.run(stop, once=values["once"])
    finally:
        directory.close()
    if values["once"] and not done:
        raise FedMoEError("not all was done; the lines above say why", about="once")


def _judge(store: Any, data: Sequence[str], base_model: str, *, once: bool) -> Any:
    """Measures losses on these rows, which are read first: with `--once`, as far as no base model is needed."""
    from fedmoe.errors import RedisUnavailableError, UnknownExpertError
    from fedmoe.settings import HeldOutSettings
    from fedmoe.tools.evaluate import Adapter
    from fedmoe.tools.follow.gain import HeldOutLoss
    from fedmoe.util.log import say

    held_out = HeldOutLoss(
        store,
        HeldOutSettings(data=data, base_model=base_model),
        report=partial(say, err=True),
    )
    with suppress(RedisUnavailableError, UnknownExpertError):  # waited for, as without --data
        held_out.check(load=not once)
    return lambda file, config: held_out(Adapter(file=file, config=config))
