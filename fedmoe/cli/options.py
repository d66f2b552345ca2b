"""Options that several commands share."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

if TYPE_CHECKING:
    from fedmoe.store.connection import RedisSettings


class Duration(click.ParamType[float]):
    """A time span with its unit, for example 30m, as seconds."""

    name = "duration"
    units: ClassVar = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds; fails if there is no unit, which could mean anything."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", str(value).strip())
        if not match or not float(match[1]):
            self.fail(
                f"{value!r} must be a number above 0 with its unit, like 7d, 12h, 30m or 90s", param, ctx
            )
        return float(match[1]) * self.units[match[2]]


def redis_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --redis, --prefix and --redis-timeout."""
    command = click.option(
        "--redis-timeout",
        type=float,
        default=10.0,
        show_default=True,
        envvar="FEDMOE_REDIS_TIMEOUT",
        show_envvar=True,
        help="Seconds after which an unanswered command has failed.",
    )(command)
    command = click.option(
        "--prefix",
        default="fedmoe",
        show_default=True,
        envvar="FEDMOE_PREFIX",
        show_envvar=True,
        help="First part of every key; one federation each.",
    )(command)
    return click.option(
        "--redis",
        metavar="URL",
        default="redis://127.0.0.1:6379/0",
        show_default=True,
        envvar="FEDMOE_REDIS",
        show_envvar=True,
        help="redis://, rediss:// (TLS) or unix:// URL, or sentinel://HOST[:PORT][,HOST...]/MASTER; "
        "with user:password@ if need be.",
    )(command)


def bad_rows_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --bad-rows."""
    return click.option(
        "--bad-rows",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="JSONL file for a list of the rows that cannot be used: file, line, reason and text.",
    )(command)


def learn_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --learn."""
    return click.option(
        "--learn",
        type=click.Choice(["all", "last"]),
        default="all",
        show_default=True,
        help="Which answers of a conversation count in the loss.",
    )(command)


def redis_settings(redis: str, prefix: str, redis_timeout: float) -> "RedisSettings":
    """The settings of redis_options."""
    from fedmoe.store.connection import RedisSettings

    return RedisSettings(url=redis, prefix=prefix, timeout_s=redis_timeout)
