"""`fedmoe worker run`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedmoe.cli.options import bad_rows_option, learn_option, redis_options, redis_settings

if TYPE_CHECKING:
    from fedmoe.stopping import Stop


@click.group()
def worker() -> None:
    """Fine-tune an expert on private data."""


@worker.command()
@redis_options
@click.option("--stream", required=True, metavar="EXPERT", help="The expert to train.")
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="JSONL file; never leaves this machine."
)
@click.option(
    "--name",
    default="",
    help="This worker's name, unique on its stream.  [default: the name in --state-dir, else the host's]",
)
@click.option("--base-model", default="", help="Where the base model lies here.  [default: as the spec says]")
@click.option("--chat-template", type=click.Path(path_type=Path), metavar="FILE",
              help="Jinja template, for an expert whose base model has none; it becomes the expert's.")  # fmt: skip
@click.option(
    "--state-dir", type=click.Path(path_type=Path), help="Keep checkpoints here; a restart goes on."
)
@click.option("--checkpoint-interval", type=float, default=60.0, show_default=True,
              help="Seconds between checkpoints; each new update writes one, too.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True,
              help="auto: bf16 where the hardware has it.")  # fmt: skip
@click.option("--batch-size", type=int, default=0, help="Rows in a micro-batch.  [default: as the rules say]")
@click.option(
    "--accumulate", type=int, default=0, help="Micro-batches in a step.  [default: as the rules say]"
)
@click.option("--max-steps", type=int, default=0, help="End after so many steps of this run.")
@click.option("--max-epochs", type=float, default=0.0, help="End after so many passes over the data.")
@click.option(
    "--drain", type=float, default=30.0, show_default=True, help="Seconds to wait for the last decision."
)
@click.option("--on-bad-row", type=click.Choice(["skip", "fail"]), default="skip", show_default=True,
              help="What to do with a row that cannot be used.")  # fmt: skip
@learn_option
@bad_rows_option
@click.option("--no-wait", is_flag=True, help="Fail if Redis or the expert is not there yet.")
@click.option(
    "--log-interval", type=float, default=5.0, show_default=True, help="Seconds between progress lines."
)
def run(**options: Any) -> None:
    """Train and publish until stopped; after SIGTERM, SIGHUP or Ctrl-C, publish what is trained, then end.

    Rows are {"prompt", "completion"} or {"messages": […]}; the loss is on the answers only.
    """
    from fedmoe.stopping import Stop, stop_on_signals

    with stop_on_signals(stop := Stop()):
        _run(stop, options)


def _run(stop: "Stop", options: dict[str, Any]) -> None:
    redis = redis_settings(options["redis"], options["prefix"], options["redis_timeout"])
    from fedmoe.memory import keep_freed
    from producers.settings import WorkerSettings
    from producers.worker import Worker

    keep_freed(blocks_mib=32, free_mib=64)  # copies of the adapter come and go with every sync
    settings = WorkerSettings(
        stream=options["stream"],
        data=options["data"],
        name=options["name"],
        base_model=options["base_model"],
        chat_template=options["chat_template"],
        state_dir=options["state_dir"],
        device=options["device"],
        precision=options["precision"],
        batch_size=options["batch_size"],
        accumulate=options["accumulate"],
        max_steps=options["max_steps"],
        max_epochs=options["max_epochs"],
        checkpoint_interval_s=options["checkpoint_interval"],
        drain_s=options["drain"],
        wait=not options["no_wait"],
        on_bad_row=options["on_bad_row"],
        learn=options["learn"],
        bad_rows=options["bad_rows"],
        log_interval_s=options["log_interval"],
    )
    Worker(redis, settings, stop=stop, report=click.echo).run()
