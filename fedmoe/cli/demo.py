"""`fedmoe demo`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fedmoe.util.disk import cache_directory

if TYPE_CHECKING:
    from fedmoe.protocol.federation import Federation


@click.command()
@click.option("--redis", metavar="URL", default="", help="URL of the Redis to use.  [default: a private one]")
@click.option("--prefix", default="fedmoe-demo", show_default=True, help="Prefix of every key.")
@click.option(
    "--model", default="", help="Hub id or directory of the base model.  [default: SmolLM2-135M-Instruct]"
)
@click.option("--data", type=click.Path(path_type=Path), help="Directory with a JSONL file for each expert.  "
              "[default: Python, SQL and documentation, built on this machine]")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-results"), show_default=True,
              help="Directory for the results.")  # fmt: skip
@click.option(
    "--seconds", type=float, default=120.0, show_default=True, help="Seconds that the workers train."
)
@click.option("--rows", type=int, default=16, show_default=True, help="Held-out rows to evaluate per domain.")
@click.option(
    "--learning-rate", type=float, default=1e-3, show_default=True, help="AdamW learning rate (workers)."
)
@click.option(
    "--gain", type=float, default=2.0, show_default=True,
    help="Weight of a round of updates of the gateway, in which each worker publishes once.",
)  # fmt: skip
@click.option("--gateway-scale", type=float, default=1.0, show_default=True, help="Sum of the merge weights.")
def demo(redis: str, prefix: str, model: str, data: Path | None, out: Path, seconds: float, rows: int,
         learning_rate: float, gain: float, gateway_scale: float) -> None:  # fmt: skip
    """Train three experts of one small real model on this machine, and a gateway that knows all their domains.

    Starts a private Redis, an aggregator and three workers, which train expert and gateway by turns; shows their
    progress, and prints the held-out losses.
    """
    from fedmoe.demo.run import Demo, DemoSettings
    from fedmoe.util.stopping import end_like_ctrl_c

    settings = DemoSettings(
        out=out, cache=cache_directory(), redis=redis, prefix=prefix, model=model, data=data, train_s=seconds,
        rows=rows, learning_rate=learning_rate, gain=gain, gateway_scale=gateway_scale,
    )  # fmt: skip
    end_like_ctrl_c()
    Demo(settings, report=click.echo, show=Display().show).run()


class Display:
    """A live progress table: redrawn on a terminal, else printed every ten seconds."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._lines = 0
        self._shown_at = float("inf")

    def show(self, view: "Federation", left_s: float) -> None:
        """Show the experts, and the seconds of training that are left."""
        from fedmoe.protocol.names import domain_of

        if not self._live and left_s > self._shown_at - 10:
            return
        self._shown_at = left_s
        rows = [f"training for {max(0.0, left_s):.0f} s more"]
        for expert in view.experts:
            version = expert.meta.version if expert.meta else 0
            several = len(expert.workers) > 1
            workers = [
                f"{f'{domain_of(w.name)}: ' if several else ''}step {w.step}, loss {w.loss:.3f}, "
                f"{w.tokens_per_s:.0f} tokens/s, staleness {w.staleness}"
                for w in expert.workers
                if w.step and w.loss is not None and w.tokens_per_s is not None
            ]
            first, *others = workers or ["loading the model"]
            rows.append(f"  {expert.name:<14} version {version:<3} {first}")
            rows += [f"{'':<28} {other}" for other in others]
        if self._live and self._lines:
            click.echo(f"\x1b[{self._lines}A\x1b[J", nl=False)
        click.echo("\n".join(rows))
        self._lines = len(rows)
