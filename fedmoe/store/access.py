"""Checks of TLS and users: the end of the certificate, and the users' rights on all nodes."""

import time

from fedmoe.errors import RedisUnavailableError
from fedmoe.store.connection import Connection
from fedmoe.store.permissions import DEFAULT_USER
from fedmoe.store.users import Users
from fedmoe.util.check import FAIL, OK, WARN, Check

SOON_DAYS = 30
_FORGETS = (
    "the user default lacks rights, and with its rights Redis loads transactions from its append-only file: a restart "
    f"may lose everything. In the ACL file its line must be `{DEFAULT_USER}`; nobody can log in as it"
)


def access_checks(connection: Connection) -> list[Check]:
    """The checks of TLS, and of the users if this user may list them; the connection has been used before."""
    checks = []
    if connection.certificate_ends is not None:
        checks.append(certificate_check(connection.certificate_ends, now=time.time()))
    users = Users(connection)
    try:
        there = users.parties()
        if odd := users.differences():
            checks += [Check(FAIL, "users", text) for text in odd]
        elif there:
            checks.append(Check(OK, "users", f"{len(there)} enrolled, the same on every master and replica"))
        lacking, surplus = users.outdated()
        checks += [Check(level, "users", text) for level, text in ((FAIL, lacking), (WARN, surplus)) if text]
        if not users.may_default_do_all():
            checks.append(Check(FAIL, "users", _FORGETS))
    except RedisUnavailableError:  # not an operator
        pass
    return checks


def certificate_check(end: float, *, now: float) -> Check:
    """Judge a certificate by its end, a Unix time. Pure."""
    days = int((end - now) // 86_400)
    if days < SOON_DAYS:
        return Check(
            WARN,
            "certificate",
            f"of the server ends in {days} days: renew it (fedmoe init DIR --renew), restart Redis",
        )
    return Check(OK, "certificate", f"of the server is valid for {days} days")
