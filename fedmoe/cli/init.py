"""`fedmoe init`: the deployment directory of a new federation."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedmoe.protocol.parties import Party


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--host", "hosts", multiple=True, metavar="HOST",
              help="Name or address by which other machines reach Redis; repeatable, the first one stands in the "
                   "enrolment files.")  # fmt: skip
@click.option(
    "--port", default=6379, show_default=True, type=click.IntRange(1, 65_535), help="Port of Redis."
)
@click.option("--redis-dir", type=click.Path(path_type=Path), metavar="DIR",
              help="Directory of redis.conf, users.acl and tls on the machine or in the container of Redis; copy them "
                   "there.  [default: DIRECTORY]")  # fmt: skip
@click.option("--worker", "workers", multiple=True, metavar="EXPERT/NAME",
              help="Worker to enrol at once, by its expert and its name; repeatable.")  # fmt: skip
@click.option("--prefix", default="fedmoe", show_default=True, help="Prefix of every key.")
@click.option("--beside", metavar="FILE|URL",
              help="Redis or cluster that runs already, by the enrolment file of an operator there (give another "
                   "--prefix), or by the URL of a user who may set users; its users are created at once.")  # fmt: skip
@click.option("--insecure", is_flag=True, envvar="FEDMOE_INSECURE",
              help="Allow plain TCP to a Redis of --beside on another machine.")  # fmt: skip
@click.option(
    "--renew",
    is_flag=True,
    help="Renew the server's certificate of this deployment, also for each --host; change nothing else.",
)
@click.pass_context
def init(
    ctx: click.Context,
    /,
    directory: Path,
    hosts: tuple[str, ...],
    port: int,
    redis_dir: Path | None,
    workers: tuple[str, ...],
    prefix: str,
    beside: str | None,
    insecure: bool,
    renew: bool,
) -> None:
    """Write what a new federation needs into DIRECTORY: Redis with TLS and users, and an enrolment file for each party.

    Give each party its enrolment file on a safe way: it holds a password.
    """
    import time

    from fedmoe.errors import SettingsError
    from fedmoe.store.url import is_loopback
    from fedmoe.tools.deploy.certificates import SERVER_DAYS, require_cryptography
    from fedmoe.tools.deploy.deployment import CONF, Deployment
    from fedmoe.tools.deploy.deployment import renew as renew_certificate

    if beside is not None:
        given = {
            name
            for name in ("hosts", "port", "redis_dir", "renew")
            if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
        }
        if given:
            raise SettingsError(
                "--beside says where Redis is, which has its certificate: leave out the options of a server",
                about="beside",
            )
        _share(directory, prefix, tuple(map(_worker, workers)), beside, insecure=insecure)
        return
    require_cryptography()
    if renew and workers:
        raise SettingsError(
            "--renew changes the server's certificate only: enrol a worker with `fedmoe worker enrol`",
            about="worker",
        )
    if renew:
        found = renew_certificate(directory, hosts)
        click.echo(
            f"{directory}: the server's certificate is valid for {SERVER_DAYS} days, for {', '.join(found)}"
        )
        click.echo("Redis takes it when it restarts; fedmoe goes on by itself after that")
        return
    if not hosts:
        raise SettingsError(
            "no host: name the machine of Redis as the others reach it (--host redis.example.org)",
            about="host",
        )
    made = Deployment(
        directory=directory, hosts=hosts, port=port, prefix=prefix, workers=tuple(map(_worker, workers)),
        redis_dir=redis_dir,
    )  # fmt: skip
    made.write(now=time.time())
    _tell(directory, made.workers, start=f"redis-server {shlex.quote(str(redis_dir or directory))}/{CONF}")
    if is_loopback(made.url):
        _warn_of_loopback(hosts[0])
    click.echo("keep tls/ca.key where only you can read it: with it others could pretend to be this Redis")


def _share(
    directory: Path, prefix: str, workers: tuple["Party", ...], beside: str, *, insecure: bool
) -> None:
    from fedmoe.errors import RedisUnavailableError
    from fedmoe.redis_settings import RedisSettings
    from fedmoe.store.url import is_loopback
    from fedmoe.tools.deploy.shared import share

    # Without a scheme it is refused as a URL: the message for a file would show its password.
    if "://" in beside or ("@" in beside and not Path(beside).exists()):
        host = RedisSettings(url=beside, insecure=insecure)
    else:
        host = RedisSettings(enrolment=Path(beside), insecure=insecure)
    notes, warning = share(directory, prefix, workers, host)
    _tell(directory, workers)
    click.echo(f"check it:          fedmoe --config {shlex.quote(str(directory))}/fedmoe.toml doctor")
    if is_loopback(host.url):
        _warn_of_loopback(host.shown)
    if warning:
        click.echo(f"warning: {warning}", err=True)
    if notes:
        raise RedisUnavailableError("; ".join(notes), about="nodes")


def _warn_of_loopback(name: str) -> None:
    click.echo(
        f"warning: {name} is this machine itself, and others cannot reach it: name it as they do", err=True
    )


def _tell(directory: Path, workers: "Sequence[Party]", start: str = "") -> None:
    """Print which files there are, and what to type next."""
    from fedmoe.tools.deploy.parties import ENROLMENTS, parties

    fedmoe = f"fedmoe --config {shlex.quote(str(directory))}/fedmoe.toml"
    for file, party in parties(workers).items():
        click.echo(f"{directory / ENROLMENTS / file}: {party}")
    if start:
        click.echo(f"start Redis:       {start}")
    click.echo(f"the aggregator:    {fedmoe} aggregator run")
    click.echo(f"one more worker:   {fedmoe} worker enrol NAME --stream EXPERT")


def _worker(text: str) -> "Party":
    from fedmoe.errors import SettingsError
    from fedmoe.protocol.parties import Party

    expert, slash, name = text.partition("/")
    if not slash:
        raise SettingsError(
            f"--worker must be EXPERT/NAME, like sql_expert/sql-1, not {text!r}", about="worker"
        )
    return Party(role="worker", expert=expert, name=name)
