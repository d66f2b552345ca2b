"""Checks of TLS and users: how long the certificate lasts, and whether all nodes have the same users."""

import time

from fedmoe.errors import RedisUnavailableError
from fedmoe.store.connection import Connection
from fedmoe.store.users import Users
from fedmoe.util.check import FAIL, OK, WARN, Check

SOON_DAYS = 30
DEFAULT_LACKS = (
    "the user `default` may not do everything: Redis 7.0 reads its append-only file as that user, and would drop every "
    "transaction in it at its next start: write `user default off ~* &* +@all`, and nobody can log in as it"
)


def access_checks(connection: Connection) -> list[Check]:
    """The checks of TLS, and of the users if this user may list them; the connection has been used before."""
    checks = []
    if connection.certificate_ends is not None:
        checks.append(certificate_check(connection.certificate_ends, now=time.time()))
    users = Users(connection)
    try:
        if users.default_lacks_rights():
            checks.append(Check(FAIL, "durability", DEFAULT_LACKS))
        there = users.parties()
        if odd := users.differences():
            checks += [Check(FAIL, "users", text) for text in odd]
        elif there:
            checks.append(Check(OK, "users", f"{len(there)} enrolled, the same on every master and replica"))
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
