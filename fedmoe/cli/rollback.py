"""`fedmoe expert rollback`, while the federation runs."""

import getpass
import socket
from pathlib import Path

import click

from fedmoe.cli.declared import redis_options
from fedmoe.settings import RedisSettings


@click.command()
@redis_options
@click.option("--to", "to", required=True, type=click.IntRange(min=0), metavar="VERSION",
              help="Version whose weights the expert gets, as a count of updates.")  # fmt: skip
@click.option("--keep-updates", "directory", type=click.Path(path_type=Path), metavar="DIR",
              help="Directory in which `fedmoe aggregator run --keep-updates` keeps the updates; the version is "
                   "recomputed from them.")  # fmt: skip
@click.option("--from", "backup", type=click.Path(path_type=Path), metavar="DIR",
              help="Backup that holds the version, instead of kept updates.")  # fmt: skip
@click.argument("name")
def rollback(redis: RedisSettings, to: int, directory: Path | None, backup: Path | None, name: str) -> None:
    """Give the expert NAME the weights of an earlier version, as a new version; it may be served and trained meanwhile.

    Decisions stay: no update counts twice. Updates that were trained on the versions in between are refused, and their
    workers go on from the new version.
    """
    from consumers.rollback import state_from_backup, state_from_updates
    from fedmoe.errors import SettingsError
    from fedmoe.protocol.names import check_expert
    from fedmoe.protocol.spec import Spec
    from fedmoe.store.change import whole_expert
    from fedmoe.store.connection import Connection
    from fedmoe.store.expert import ExpertStore
    from fedmoe.store.rollback import VersionState, check_target, roll_back_soon
    from fedmoe.tools.backup import Backup

    if (directory is None) == (backup is None):
        raise SettingsError(
            f"version {to} comes from one place: give either --keep-updates DIR, the directory that the aggregator "
            "keeps updates in, or --from DIR, a backup",
            about="keep_updates",
        )
    store = ExpertStore(Connection(redis), check_expert(name))
    check_target(name, whole_expert(store)[0].version, to)
    if directory is not None and not directory.is_dir():
        raise SettingsError(
            f"{directory} is not a directory: give the one that the aggregator keeps updates in",
            about="keep_updates",
        )
    source = None if backup is None else Backup(backup)

    def find(spec: Spec) -> VersionState:
        if source is not None:
            return state_from_backup(store.connection, name, spec, to=to, backup=source)
        assert directory is not None
        return state_from_updates(store.connection, name, spec, to=to, directory=directory)

    meta = roll_back_soon(store, find, by=_operator())
    click.echo(
        f"{name}: version {meta.version} has the weights of version {to}; updates that were trained on "
        f"{_versions(to + 1, meta.version - 1)} are refused"
    )


def _versions(first: int, last: int) -> str:
    return f"version {first}" if first == last else f"versions {first} to {last}"


def _operator() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        user = "somebody"
    return f"{user}@{socket.gethostname()}"
