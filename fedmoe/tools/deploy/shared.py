"""A further federation on a Redis that has one: its users there, and a deployment directory without a server."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedmoe.errors import RedisUnavailableError, SettingsError
from fedmoe.protocol.keys import Keys
from fedmoe.protocol.parties import Party
from fedmoe.redis_settings import RedisSettings
from fedmoe.store.audit import ENROLLED, write_line
from fedmoe.store.connection import Connection
from fedmoe.store.users import Users, password_rule, require_master, require_users
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


def share(directory: Path, prefix: str, workers: Sequence[Party], host: RedisSettings) -> list[str]:
    """Create the users of the federation `prefix` and write their enrolment files; after an error nothing is there.

    Args:
        directory: to write; it must be empty, or not be there.
        prefix: of the new federation's keys.
        workers: the workers to enrol at once.
        host: enrolment of an operator of the federation that is on the server already.

    Returns:
        Sentences on what is not as it should be, as on a replica that was not reached.

    Raises:
        SettingsError: for a name that cannot be used, or if the federation is there already.
        RedisUnfitError: if this operator may not create users.
        RedisUnavailableError: if Redis cannot be reached.
    """
    assert host.enrolled is not None
    check_files(workers)
    if prefix == host.prefix:
        raise SettingsError(
            f"the federation {prefix!r} is that of the enrolment: give the new one another --prefix",
            about="prefix",
        )
    connection = Connection(host)
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
    new, audit = parties(workers), connection
    try:
        # The operator first: the audit log then has a line for each of the others.
        for file in sorted(new, key=lambda file: new[file].role != "operator"):
            party, path = new[file], directory / ENROLMENTS / file
            enrolled = new_enrolment(party, url=host.url, prefix=prefix, ca=host.enrolled.ca)
            write_private(path, enrolment_text(enrolled, party))
            write_line(
                audit, ENROLLED, f"{party} of the federation {prefix}" if audit is connection else party
            )
            users.set(party, (password_rule(enrolled.password),))
            if audit is connection:
                audit = Connection(RedisSettings(enrolment=path, timeout_s=host.timeout_s))
        write_private(directory / SETTINGS, settings_text(directory, workers))
    except BaseException:
        for party in new.values():
            with suppress(RedisUnavailableError):
                users.remove(party)
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return users.notes
