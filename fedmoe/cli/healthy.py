"""`fedmoe healthy`: the health check of a process on this machine."""

from pathlib import Path

import click


@click.command()
@click.option(
    "--alive-file",
    type=click.Path(path_type=Path),
    envvar="FEDMOE_ALIVE_FILE",
    show_envvar=True,
    metavar="FILE",
    required=True,
    help="File that the process was started with (--alive-file).",
)
def healthy(alive_file: Path) -> None:
    """Say whether the process that writes --alive-file is alive; exit code 0 if it is, else 1.

    It takes a fifth of a second and asks nobody but the file system, so a container may run it every few seconds. A
    process that waits for its Redis is alive; `fedmoe status` and `fedmoe doctor` tell about the federation.
    """
    import time

    from fedmoe.util.alive import look

    click.echo(look(alive_file, now_s=time.monotonic()))
