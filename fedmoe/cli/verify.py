"""`fedmoe verify`."""

from collections.abc import Sequence
from pathlib import Path

import click

from fedmoe.cli.declared import redis_options
from fedmoe.settings import RedisSettings


@click.command()
@redis_options
@click.option(
    "--expert",
    "experts",
    multiple=True,
    metavar="NAME",
    help="Expert to verify; repeatable.  [default: all experts]",
)
@click.option("--keep-updates", "directory", required=True, type=click.Path(path_type=Path),
              help="Directory in which `fedmoe aggregator run --keep-updates` keeps the updates.")  # fmt: skip
def verify(redis: RedisSettings, experts: Sequence[str], directory: Path) -> None:
    """Recompute experts from their log and the kept updates, and compare them with Redis byte for byte.

    Exit code 0 if all are equal, 1 if one differs or cannot be replayed.
    """
    from consumers.verify import replay
    from fedmoe.errors import DamagedExpertError, FedMoEError, SettingsError
    from fedmoe.store.archive import Archive
    from fedmoe.store.connection import Connection
    from fedmoe.store.gateway import GatewayStore

    if not directory.is_dir():
        raise SettingsError(
            f"{directory} is not a directory: give the one that the aggregator keeps updates in",
            about="directory",
        )
    store = GatewayStore(Connection(redis))
    wrong = []
    names = list(experts) or list(store.experts())
    if not names:
        raise SettingsError("there are no experts to verify: check --redis and --prefix", about="experts")
    for name in names:
        spec = store.spec(name)
        try:
            meta, exact, lines, vectors = store.whole_history(name)
        except DamagedExpertError as error:
            click.echo(str(error))
            wrong.append(name)
            continue
        done = replay(spec, meta, lines, Archive(directory / name, read_only=True))
        weights, state = exact.weights, exact.server_state
        odd = done.odd_vectors(vectors)
        equal = not done.problem and done.same_values(weights, state) and not odd
        verdict = "equal"
        if not done.weights.same_values(weights):
            verdict = "differs: other weights than in Redis"
        elif not done.same_values(weights, state):
            verdict = "differs: another server state than in Redis"
        elif odd:
            verdict = f"differs: other domain vectors than in Redis, of {', '.join(odd)}"
        if done.problem:
            verdict = f"cannot be replayed: {done.problem}"
        since = f" from version {done.since} ({done.begin})" if done.since else ""
        back = f", {done.rollbacks} of them rollbacks" if done.rollbacks else ""
        what = "versions" if back else "updates"
        click.echo(
            f"{name}: replayed {done.version - done.since} of {meta.version} {what}{back}{since}, {verdict}"
        )
        if not equal:
            wrong.append(name)
    if wrong:
        raise FedMoEError(f"not verified: {', '.join(wrong)}", about="experts")
