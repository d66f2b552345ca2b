"""A federation on a Redis that is there: its users on all nodes, and a deployment directory without a server."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fedmoe.errors import RedisUnavailableError, SettingsError
from fedmoe.protocol.keys import Keys
from fedmoe.protocol.parties import Party
from fedmoe.redis_settings import RedisSettings
from fedmoe.store.audit import ENROLLED, write_line
from fedmoe.store.connection import Connection
from fedmoe.store.users import Users, password_rule, require_master, require_users
from fedmoe.tools.deploy.deployment import USERS
from fedmoe.tools.deploy.enrol import ca_of, without_login
from fedmoe.tools.deploy.files import enrolment_text, write_private
from fedmoe.tools.deploy.parties import (
    ENROLMENTS,
    SETTINGS,
    check_files,
    make_empty,
    new_enrolment,
    parties,
    settings_text,
)


def share(
    directory: Path, prefix: str, workers: Sequence[Party], host: RedisSettings
) -> tuple[list[str], str]:
    """Create the users of the federation `prefix` and write their enrolment files; after an error nothing is there.

    Args:
        directory: to write; it must be empty, or not be there.
        prefix: of the new federation's keys.
        workers: the workers to enrol at once.
        host: of an operator of a federation that is on the server already, or of a user who may set users.

    Returns:
        Sentences on what is not as it should be, as on a replica that was not reached; and a warning of a server that
        keeps its users until it restarts, "" for one that saves them.

    Raises:
        SettingsError: for a name that cannot be used, or if the federation is there already.
        RedisUnfitError: if this operator may not create users.
        RedisUnavailableError: if Redis cannot be reached.
    """
    check_files(workers)
    if host.enrolled and prefix == host.prefix:
        raise SettingsError(
            f"the federation {prefix!r} is that of the enrolment: give the new one another --prefix",
            about="prefix",
        )
    connection = Connection(host if host.enrolled else replace(host, prefix=prefix))
    users = Users(connection, Keys(prefix))
    require_master(users)
    require_users(users)
    if users.parties():
        raise SettingsError(
            f"this Redis has users of a federation {prefix!r} already: give another --prefix, or enrol with its own "
            "operator",
            about="prefix",
        )
    make_empty(directory)
    (directory / ENROLMENTS).mkdir(mode=0o700)
    new, lines, audit = parties(workers), [], connection
    try:
        # The operator first: an operator of another federation may not write to the audit log of this one.
        for file in sorted(new, key=lambda file: new[file].role != "operator"):
            party, path = new[file], directory / ENROLMENTS / file
            enrolled = new_enrolment(party, url=without_login(host.url), prefix=prefix, ca=ca_of(host))
            write_private(path, enrolment_text(enrolled, party))
            is_first = bool(host.enrolled) and party.role == "operator"
            write_line(audit, ENROLLED, f"{party} of the federation {prefix}" if is_first else party)
            hashes = (password_rule(enrolled.password),)
            users.set(party, hashes)
            lines.append(users.line(party, hashes))
            if is_first:
                own = RedisSettings(enrolment=path, timeout_s=host.timeout_s, insecure=host.insecure)
                audit = Connection(own)
                write_line(audit, ENROLLED, party)
        write_private(directory / SETTINGS, settings_text(directory, workers))
        if not users.has_file:
            write_private(directory / USERS, "\n".join(lines) + "\n")
    except BaseException:
        for party in new.values():
            with suppress(RedisUnavailableError):
                users.remove(party)
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return users.notes, users.keep_by_hand(f"write the lines in {directory / USERS} into its redis.conf")
