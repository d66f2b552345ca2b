"""The options of an expert's rules, for the commands that create an expert or change one."""

from collections.abc import Callable, Mapping
from typing import Any

import click

Command = Callable[..., Any]


class StalenessBound(click.ParamType[int | str]):
    """A whole number, or `auto`."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """The number, or the word."""
        if value == "auto" or isinstance(value, int):
            return str(value) if value == "auto" else int(value)
        if str(value).strip().isdecimal():
            return int(value)
        return self.fail(f"{value!r} must be a whole number of at least 0, or auto", param, ctx)


# name -> (type, default of a new expert, help); named as in `RuleSet.settings`
RULES: dict[str, tuple[Any, Any, str]] = {
    "lr": (float, 1.0, "Aggregator's step: expert += lr × decay × Δ."),
    "decay": (
        click.Choice(["constant", "polynomial", "hinge"]),
        "polynomial",
        "How much a stale update weighs.",
    ),
    "decay_a": (float, 1.0, "Exponent of polynomial decay, (1+τ)^-a; slope of hinge decay."),
    "decay_b": (float, 4.0, "Staleness τ up to which hinge decay gives full weight, in updates."),
    "max_staleness": (
        StalenessBound(),
        "auto",
        "Refuse an update if more than this many others were applied since its base; auto: 256, or 4 per worker.",
    ),
    "max_norm": (float, 0.0, "Refuse an update whose L2 norm exceeds this."),
    "sync_interval": (float, 10.0, "Seconds between publications of a worker."),
    "learning_rate": (float, 2e-4, "Workers' learning rate (AdamW)."),
    "weight_decay": (float, 0.0, "Workers' weight decay (AdamW)."),
    "batch_size": (int, 4, "Rows in a worker's micro-batch."),
    "accumulate": (int, 1, "Micro-batches in a worker's step."),
    "max_length": (int, 512, "Tokens of a row that workers train on."),
    "warmup_steps": (int, 10, "Steps in which a worker's learning rate rises to its value."),
    "clip_norm": (float, 1.0, "Largest L2 norm of a worker's gradient; a larger one is scaled down."),
}
OWN_DEFAULTS = {"max_norm": "ten times the initial adapter's norm"}  # that are said in words


def rules_options(*, unless_given: str = "") -> Callable[[Command], Command]:
    """Add an option for each rule; `unless_given` says what holds without one, else the defaults of a new expert do."""

    def decorate(command: Command) -> Command:
        for name, (kind, default, text) in reversed(RULES.items()):
            shown = unless_given or OWN_DEFAULTS.get(name, "")
            command = click.option(
                f"--{name.replace('_', '-')}",
                type=kind,
                default=None if unless_given else default,
                show_default=not shown,
                help=text + (f"  [default: {shown}]" if shown else ""),
            )(command)
        return command

    return decorate


def given_rules(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the rules' options that were given."""
    return {name: options[name] for name in RULES if options[name] is not None}
