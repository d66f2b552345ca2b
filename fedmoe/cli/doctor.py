"""`fedmoe doctor`: check this installation and the Redis."""

import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from fedmoe.cli.declared import made, options
from fedmoe.settings import RedisSettings

if TYPE_CHECKING:
    from fedmoe.util.check import Check

ROLES = (
    "aggregator",
    "worker",
    "operator",
    "monitor",
)  # copied from store/permissions.py, which takes longer to import
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@options(RedisSettings)
@click.option("--no-redis", is_flag=True, help="Check this installation only.")
@click.option("--role", type=click.Choice(ROLES), default=None,
              help="Fail unless this Redis user has all rights of this role.  [default: the enrolment's]")  # fmt: skip
@click.option("--acl", type=click.Choice(ROLES), default=None,
              help="Print the ACL line (Redis 7.0, Valkey) of a user with this role, and check nothing.")  # fmt: skip
@click.option(
    "--stream",
    default="",
    metavar="EXPERT",
    help="Expert that the worker trains.  [default: the first by name]",
)
@click.option("--name", default="", help="Name of the worker.  [default: the host's name]")
@click.option(
    "--base-model",
    default="",
    help="Hub id or directory of the base model to check.  [default: the expert's]",
)
@click.pass_context
def doctor(
    ctx: click.Context,
    /,
    no_redis: bool,
    role: str | None,
    acl: str | None,
    stream: str,
    name: str,
    base_model: str,
    **redis: Any,
) -> None:
    """Check this installation and the Redis; exits 1 if something must be repaired first.

    Prints one line per check: ok, warn (you may want to change it) or fail (it will not work).
    """
    from fedmoe.protocol.names import check_domain, check_name, clean_name
    from fedmoe.util.check import FAIL

    settings = None if no_redis else made(RedisSettings, redis)
    if settings and (enrolled := settings.enrolled):
        role = role or enrolled.role or None
        stream, name = stream or enrolled.expert, name or (enrolled.name if enrolled.expert else "")
    worker = check_name("worker name", name) if name else clean_name(socket.gethostname())
    if stream:
        check_domain(stream)
    if acl:
        click.echo(acl_line(settings or RedisSettings(), acl, stream=stream, worker=worker))
        return
    failed = False
    for check in run_checks(settings, role=role or "", stream=stream, worker=worker, base_model=base_model):
        click.echo(
            f"{click.style(f'{check.level:<4}', fg=COLOURS[check.level])}  {check.what:<11}  {check.text}"
        )
        failed |= check.level == FAIL
    ctx.exit(1 if failed else 0)


def acl_line(settings: "RedisSettings", role: str, *, stream: str, worker: str) -> str:
    """A line of an ACL file for a user with exactly the rights of a role; PASSWORD is a placeholder."""
    from fedmoe.errors import SettingsError
    from fedmoe.protocol.keys import Keys
    from fedmoe.protocol.names import may_train_gateway
    from fedmoe.store.connection import Connection
    from fedmoe.store.permissions import ANY, ROLES, acl_rules, worker_rights

    if role == "worker" and not stream:
        raise SettingsError(
            "--acl worker prints the rights for one expert: give --stream EXPERT", about="stream"
        )
    keys = Keys(settings.prefix)
    if role == "worker":  # its expert's rules may ask for the gateway at any time
        rights = worker_rights(keys, stream, worker, trains_gateway=may_train_gateway(stream, worker))
    else:
        rights = ROLES[role].rights(keys, stream or ANY, worker)
    user = worker if role == "worker" else role
    connection = Connection(settings)
    database = connection.client.get_connection_kwargs().get("db") or 0
    rules = acl_rules(rights, database=database, cluster=connection.cluster is not None)
    return f"user {user} on >PASSWORD {' '.join(rules)}"


def run_checks(
    settings: "RedisSettings | None", *, role: str, stream: str, worker: str, base_model: str
) -> Iterator["Check"]:
    """Yield each check as soon as it is done; with `settings` None those of Redis are left out."""
    from fedmoe.tools import doctor as checks
    from fedmoe.util.check import FAIL

    yield checks.check_python()
    yield checks.check_places()
    if stranger := checks.check_stranger():
        yield stranger
    yield from checks.check_libraries()
    torch = checks.check_torch()
    yield torch
    yield checks.check_server()
    if settings is not None:
        found, spec_base = check_server_and_user(settings, role=role, stream=stream, worker=worker)
        yield from found
        if settings.enrolment and (open_file := checks.check_users_file(settings.enrolment)):
            yield open_file
        base_model = base_model or spec_base
    if torch.level != FAIL:
        from fedmoe.protocol.lora import DEFAULT_BASE_MODEL

        yield checks.check_base_model(base_model or DEFAULT_BASE_MODEL)


def check_server_and_user(
    settings: "RedisSettings", *, role: str, stream: str, worker: str
) -> tuple[list["Check"], str]:
    """The result of check_redis, or one failed check if Redis cannot be reached."""
    from fedmoe.errors import RedisUnavailableError
    from fedmoe.store.connection import Connection
    from fedmoe.store.probe import check_redis
    from fedmoe.util.check import FAIL, Check

    try:
        return check_redis(Connection(settings), stream=stream, worker=worker, role=role)
    except RedisUnavailableError as error:
        return [Check(FAIL, "redis", f"{error}; check that it is running and that --redis is right")], ""
