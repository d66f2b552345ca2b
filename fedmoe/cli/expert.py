"""`fedmoe expert remove`."""

import sys
import time

import click

from fedmoe.cli.options import redis_options, redis_settings
from fedmoe.text import printable

NOTICE_S = 20.0  # in which workers see it that look at Redis every ten seconds
LOOK_EVERY_S = 0.5


@click.group()
def expert() -> None:
    """Manage single experts."""


@expert.command()
@redis_options
@click.option("--yes", is_flag=True, help="Remove without asking.")
@click.argument("name")
def remove(redis: str, prefix: str, redis_timeout: float, yes: bool, name: str) -> None:
    """Remove the expert NAME for good, also while it is served and trained.

    Its aggregators stop serving it, its workers end, and the gateway is built without it. A backup can be restored
    later.
    """
    from fedmoe.errors import SettingsError
    from fedmoe.names import check_expert
    from fedmoe.store.connection import Connection
    from fedmoe.store.remove import look_at_expert, remove_expert, sweep

    connection = Connection(redis_settings(redis, prefix, redis_timeout))
    there = look_at_expert(connection, check_expert(name))
    served = f", served by {printable(there.lease)}" if there.lease else ""
    what = f"{name} (version {printable(there.version)}, workers running: {len(there.workers)}{served})"
    if not yes:
        if not sys.stdin.isatty():
            raise SettingsError(
                f"cannot ask whether to remove {what}, because stdin is not a terminal: give --yes"
            )
        click.confirm(f"Remove {what} for good? (to keep a copy, run `fedmoe backup` first)", abort=True)
    remove_expert(connection, name)
    click.echo(f"removed {what}")
    until = time.monotonic() + NOTICE_S
    if there.workers:
        click.echo("waiting for its workers to end")
    left = there.workers
    while left and time.monotonic() < until:
        time.sleep(LOOK_EVERY_S)
        left = sweep(connection, name)
    if left:
        names = ", ".join(map(printable, left[:10]))
        click.echo(f"workers still running: {names}; each ends by itself at its next sync, nothing to do")
