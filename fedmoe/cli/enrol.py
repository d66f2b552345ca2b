"""`fedmoe worker | aggregator | monitor | operator  enrol | revoke | list`: who may connect, while Redis runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedmoe.cli.declared import redis_options
from fedmoe.protocol.names import may_train_gateway
from fedmoe.redis_settings import RedisSettings
from fedmoe.util.text import printable

if TYPE_CHECKING:
    from fedmoe.protocol.parties import Party
    from fedmoe.store.connection import Connection
    from fedmoe.store.users import Users

Command = Callable[..., Any]


@click.group()
def monitor() -> None:
    """Enrol and revoke monitors, who read the status and nothing else."""


@click.group()
def operator() -> None:
    """Enrol and revoke operators, and read the audit log."""


def add_enrolment(group: click.Group, role: str) -> None:
    """Add enrol, revoke and list of this role to its group."""
    whom = "worker NAME of an expert" if role == "worker" else role

    @redis_options
    @click.option("--out", type=click.Path(path_type=Path), metavar="FILE",
                  help="Enrolment file to write.  [default: NAME.toml here]")  # fmt: skip
    @click.option("--rotate", is_flag=True,
                  help="Replace the password of who is enrolled already; connections that stand are kept.")  # fmt: skip
    @click.option(
        "--url",
        default="",
        metavar="URL",
        help="URL by which the party reaches Redis, without user and password.  [default: this command's]",
    )
    @click.option("--csr", type=click.Path(path_type=Path), metavar="FILE",
                  help="Certificate request (PEM) of the party's own key; its certificate is written beside the "
                       "enrolment file. Needs --deployment.")  # fmt: skip
    @click.option("--deployment", type=click.Path(path_type=Path), metavar="DIR",
                  help="Directory that `fedmoe init` wrote, with the CA's key.")  # fmt: skip
    @_named(role)
    def enrol(
        redis: RedisSettings,
        out: Path | None,
        rotate: bool,
        url: str,
        csr: Path | None,
        deployment: Path | None,
        **who: str,
    ) -> None:
        party = _party(role, **who)
        file = out or Path(_file_of(party))
        _enrol(redis, party, file, rotate=rotate, url=url, csr=csr, deployment=deployment)

    @redis_options
    @_named(role)
    def revoke(redis: RedisSettings, **who: str) -> None:
        _revoke(redis, _party(role, **who))

    @redis_options
    def listed(redis: RedisSettings) -> None:
        _list(redis, role)

    enrol.__doc__ = (
        f"""Enrol the {whom}: create its user on every master and replica, and write its enrolment file."""
    )
    revoke.__doc__ = f"""Revoke the {whom}: remove its user everywhere and cut its connections.

    Updates that wait are still decided.
    """
    listed.__doc__ = f"""List the enrolled {role}s."""
    group.command("enrol")(enrol)
    group.command("revoke")(revoke)
    group.command("list")(listed)


def _named(role: str) -> Callable[[Command], Command]:
    """Options that name a party: a worker always has a name, of others one is called main."""
    if role != "worker":
        return click.argument("name", default="main")

    def decorate(command: Command) -> Command:
        stream = click.option(
            "--stream", required=True, metavar="EXPERT", help="Expert that the worker trains."
        )
        return stream(click.argument("name")(command))

    return decorate


def _party(role: str, name: str, stream: str = "") -> "Party":
    from fedmoe.protocol.parties import Party

    return Party(role=role, expert=stream, name=name)


def _file_of(party: "Party") -> str:
    if party.role == "worker":
        return f"{party.name}.toml"
    return f"{party.role}.toml" if party.name == "main" else f"{party.role}-{party.name}.toml"


def _enrol(
    redis: RedisSettings,
    party: "Party",
    out: Path,
    *,
    rotate: bool,
    url: str,
    csr: Path | None,
    deployment: Path | None,
) -> None:
    from fedmoe.errors import SettingsError
    from fedmoe.store.audit import ENROLLED, PREPARED, ROTATED, write_line
    from fedmoe.store.url import is_loopback, shown
    from fedmoe.store.users import password_rule, require_master
    from fedmoe.tools.deploy.enrol import certificate_for, check_out, enrolment_for
    from fedmoe.tools.deploy.files import enrolment_text, private_file, write_private

    if redis.enrolled is not None and redis.enrolled.role not in ("", "operator"):
        raise SettingsError(
            f"this enrolment is a {redis.enrolled.role}'s: only an operator enrols others (--enrolment operator.toml)",
            about="enrolment",
        )
    old = check_out(out, party, redis.prefix, rotate=rotate)
    users = _users(redis)
    require_master(users)
    connection = users.connection
    may_enrol = users.may_enrol()
    there = may_enrol and party in users.parties()
    if there != rotate and may_enrol:
        raise SettingsError(
            f"{party} is not enrolled: leave --rotate out" if rotate
            else f"{party} is enrolled already: revoke it first, or give it a new password (--rotate)",
            about="rotate" if rotate else "name",
        )  # fmt: skip
    certificate = certificate_for(party, redis.prefix, csr, deployment)
    enrolled = enrolment_for(
        redis, party, old, url=url, certificate_file=f"{out.stem}.crt" if certificate else ""
    )
    text, hashes = enrolment_text(enrolled, party), (password_rule(enrolled.password),)
    if is_loopback(enrolled.url):
        click.echo(
            f"warning: {shown(enrolled.url)} in {out} is this machine itself, and another one cannot reach it: name "
            "the URL for the others (--url rediss://HOST:PORT/0)",
            err=True,
        )
    if certificate:
        write_private(out.with_suffix(".crt"), certificate, replace=True)
    if not may_enrol:
        line = out.with_suffix(".acl")
        write_private(out, text, replace=rotate)
        write_private(line, users.line(party, hashes) + "\n", replace=rotate)
        click.echo(
            f"wrote {out} and {line}: this server does not let you set users, so its administrator must add the line "
            f"in {line} to its ACL file and load that (ACL LOAD)"
        )
        _write_line(users, PREPARED, party)
        _finish(users)
        return
    with private_file(out, text, replace=rotate):  # an error leaves what was there
        _add_first_lines(redis, connection)
        write_line(connection, ROTATED if rotate else ENROLLED, party)
        users.set(party, hashes)
    click.echo(f"{party}: {'has a new password' if rotate else 'enrolled'}; give it {out}")
    if party.role == "worker" and not may_train_gateway(party.expert, party.name):
        click.echo(
            f"it cannot train the gateway: {party.expert}.{party.name} would be no name of a worker there"
        )
    if not users.has_file:
        line = out.with_suffix(".acl")
        write_private(line, users.line(party, hashes) + "\n", replace=True)
        click.echo(
            f"warning: the server has no ACL file (aclfile), so {party} is gone when it restarts: write the line in "
            f"{line} into its redis.conf, in place of an earlier one",
            err=True,
        )
    _finish(users)


def _revoke(redis: RedisSettings, party: "Party") -> None:
    from fedmoe.errors import SettingsError
    from fedmoe.store.audit import REVOKED
    from fedmoe.store.users import require_master, require_users

    users = _users(redis)
    require_master(users)
    require_users(users)
    if users.own_name() == party.user(redis.prefix):
        raise SettingsError(
            f"{party} is the user of this command, whose connection would be cut before the change is saved: revoke "
            "it as another operator (fedmoe operator enrol NAME)",
            about="name",
        )
    if not users.remove(party):
        raise SettingsError(f"{party} is not enrolled: see `fedmoe {party.role} list`", about="name")
    click.echo(f"{party}: revoked, its connections are cut")
    _write_line(users, REVOKED, party)
    # An error, because the party may log in again after a restart.
    if text := users.keep_by_hand(
        f"take the line of `user {party.user(redis.prefix)}` out of its redis.conf"
    ):
        users.notes.append(text)
    _finish(users)


def _write_line(users: "Users", what: str, party: "Party") -> None:
    """Add what is done already to the audit log; that there is no line of it is a note."""
    from fedmoe.errors import RedisUnavailableError
    from fedmoe.store.audit import write_line

    try:
        _add_first_lines(users.connection.settings, users.connection)
        write_line(users.connection, what, party)
    except RedisUnavailableError as error:
        users.notes.append(f"the audit log has no line of it ({error})")


def _list(redis: RedisSettings, role: str) -> None:
    users = _users(redis)
    rows = [
        [one.name, one.expert or "-", one.user(redis.prefix)] for one in users.parties() if one.role == role
    ]
    if not rows:
        click.echo(f"no {role} is enrolled")
        return
    _print(("name", "expert", "user"), rows)


@operator.command()
@redis_options
def refresh(redis: RedisSettings) -> None:
    """Give every user the rights of this release, and make the users of all replicas equal to the master's."""
    from fedmoe.store.audit import ALL, REFRESHED, write_line
    from fedmoe.store.users import require_master, require_users

    users = _users(redis)
    require_master(users)
    require_users(users)
    _add_first_lines(redis, users.connection)
    write_line(users.connection, REFRESHED, ALL)
    click.echo(f"{users.refresh()} users have the rights of this release")
    if text := users.keep_by_hand(
        "write the users' lines into its redis.conf (redis-cli ACL LIST prints them)"
    ):
        click.echo(f"warning: {text}", err=True)
    _finish(users)


@operator.command()
@redis_options
def audit(redis: RedisSettings) -> None:
    """Print who enrolled and revoked whom, the oldest line first."""
    from fedmoe.store.audit import read_lines

    users = _users(redis)
    _add_first_lines(redis, users.connection)
    lines = read_lines(users.connection)
    rows = [
        [printable(text) for text in (line.at, line.what, line.party, line.by, line.host)] for line in lines
    ]
    _print(("at", "what", "party", "by", "host"), rows)
    there = map(str, users.parties()) if users.may_list() else []
    if unknown := sorted(set(there) - {line.party for line in lines}):
        click.echo(
            f"warning: no line says who enrolled {', '.join(unknown)}: somebody did it without these commands, or the "
            "lines were removed; those of `fedmoe init` come with a command that uses the enrolment file in its "
            "directory",
            err=True,
        )


def _add_first_lines(redis: RedisSettings, connection: "Connection") -> None:
    """Add the lines of `fedmoe init`, which had no Redis to write them to."""
    from fedmoe.store.audit import add_missing
    from fedmoe.tools.deploy.deployment import first_lines

    add_missing(connection, first_lines(redis.enrolment))


def _print(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _users(redis: RedisSettings) -> "Users":
    from fedmoe.store.connection import Connection
    from fedmoe.store.users import Users

    return Users(Connection(redis))


def _finish(users: "Users") -> None:
    """Report what is not as it should be; a node that was not reached is an error."""
    from fedmoe.errors import RedisUnavailableError

    if users.notes:
        raise RedisUnavailableError("; ".join(users.notes), about="nodes")


add_enrolment(monitor, "monitor")
add_enrolment(operator, "operator")
