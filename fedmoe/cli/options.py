"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fedmoe.store.connection import RedisSettings


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
        help="JSONL file to list the rows in that cannot be used: file, line, reason and text.",
    )(command)


def learn_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --learn."""
    return click.option(
        "--learn",
        type=click.Choice(["all", "last"]),
        default="all",
        show_default=True,
        help="Answers of a conversation that the loss is on.",
    )(command)


def redis_settings(redis: str, prefix: str, redis_timeout: float) -> "RedisSettings":
    """The settings of redis_options."""
    from fedmoe.store.connection import RedisSettings

    return RedisSettings(url=redis, prefix=prefix, timeout_s=redis_timeout)
