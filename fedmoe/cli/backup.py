"""`fedmoe backup` and `fedmoe restore`."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedmoe.cli.declared import redis_options
from fedmoe.settings import RedisSettings

if TYPE_CHECKING:
    from fedmoe.tools.backup import Saved


def _expert_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--expert",
        "expert",
        multiple=True,
        metavar="NAME",
        help="Expert to take; repeatable.  [default: all experts]",
    )(command)


@click.command()
@redis_options
@_expert_option
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of backups to keep: write the new one to DIR/TIME, then remove the oldest ones that this option "
    "wrote there.",
)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
def backup(redis: RedisSettings, expert: Sequence[str], keep: int | None, directory: Path) -> None:
    """Write all experts to the new directory DIR, whole or not at all.

    The federation may run meanwhile: weights, history and decisions of an expert are read at one moment.
    PeftModel.from_pretrained loads each expert from DIR/EXPERT.
    """
    from fedmoe.errors import SettingsError
    from fedmoe.store.backup import BackupStore
    from fedmoe.store.connection import Connection
    from fedmoe.tools.backup import back_up
    from fedmoe.tools.kept import back_up_and_keep
    from fedmoe.util.stopping import end_like_ctrl_c

    def report(name: str, saved: "Saved") -> None:
        click.echo(f"{name}: version {saved.version}, commit {saved.commit}")

    end_like_ctrl_c()  # so that a half-written backup is removed
    store = BackupStore(Connection(redis))
    if keep is None:
        back_up(store, directory, list(dict.fromkeys(expert)), report=report)
        click.echo(f"written to {directory}")
        return
    if expert:
        raise SettingsError(
            "--keep backs up all experts, so that no backup of a part replaces a whole one: leave --expert out",
            about="expert",
        )
    rotation = back_up_and_keep(store, directory, keep, now_s=time.time(), report=report)
    click.echo(f"written to {rotation.made}")
    for path in rotation.removed:
        click.echo(f"removed {path}")
    for path, experts in rotation.held:
        click.echo(
            f"kept {path}: no newer backup holds {experts} of that lineage; rename or remove it yourself"
        )
    for path, reason in rotation.strange:
        click.echo(f"kept {path}: {reason}", err=True)


@click.command()
@redis_options
@_expert_option
@click.option(
    "--replace",
    is_flag=True,
    help="Replace experts that are in Redis; updates applied since the backup are undone.",
)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
def restore(redis: RedisSettings, expert: Sequence[str], replace: bool, directory: Path) -> None:
    """Put the experts of the backup DIR into Redis, each whole or not at all.

    An expert that is in Redis is replaced only with --replace. Aggregators and workers may run and notice the restore
    by themselves; workers resend the undone updates that they still keep, those decided in the last minute.
    """
    from fedmoe.store.backup import BackupStore
    from fedmoe.store.connection import Connection
    from fedmoe.tools.backup import Backup
    from fedmoe.tools.backup import restore as put

    def report(name: str, saved: "Saved", replaced: str | None) -> None:
        where = "" if replaced is None else f" in place of version {replaced}"
        click.echo(f"{name}: restored at version {saved.version}{where}")

    source = Backup(directory)
    store = BackupStore(Connection(redis))
    if fit := put(store, source, list(dict.fromkeys(expert)), replace=replace, report=report):
        click.echo(fit)
    if source.prefix != redis.prefix:
        click.echo(f"under the prefix {redis.prefix!r}; the backup is of {source.prefix!r}")
