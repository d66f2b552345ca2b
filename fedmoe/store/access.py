"""Checks of TLS and users: how long the certificate lasts, and whether all nodes have the same users."""

import ssl
import time

from fedmoe.errors import RedisUnavailableError
from fedmoe.store.connection import Connection
from fedmoe.store.redis_private import socket_of
from fedmoe.store.users import Users
from fedmoe.util.check import FAIL, OK, WARN, Check

SOON_DAYS = 30


def access_checks(connection: Connection) -> list[Check]:
    """The checks of TLS, and of the users if this user may list them.

    Raises:
        RedisUnavailableError: if Redis cannot be reached.
    """
    checks = []
    if end := certificate_end(connection):
        checks.append(certificate_check(end, now=time.time()))
    users = Users(connection)
    try:
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


def certificate_end(connection: Connection) -> float | None:
    """The Unix time at which the server's certificate ends; None without TLS.

    Raises:
        RedisUnavailableError: if Redis cannot be reached.
    """
    pool = connection.client.connection_pool
    with connection.errors():
        used = pool.get_connection()
        try:
            used.connect()
            found = socket_of(used)
            certificate = found.getpeercert() if isinstance(found, ssl.SSLSocket) else None
        finally:
            pool.release(used)
    end = (certificate or {}).get("notAfter")
    return float(ssl.cert_time_to_seconds(end)) if isinstance(end, str) else None
