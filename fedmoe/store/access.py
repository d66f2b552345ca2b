"""Checks of TLS and users: the end of the certificate, and the users' rights on all nodes."""

import time
from collections.abc import Mapping

from fedmoe.errors import RedisUnavailableError
from fedmoe.store.connection import Connection
from fedmoe.store.nodes import other_nodes
from fedmoe.store.permissions import DEFAULT_USER, Right
from fedmoe.store.rights import lacking
from fedmoe.store.url import text_of
from fedmoe.store.users import Users
from fedmoe.util.check import FAIL, OK, WARN, Check

SOON_DAYS = 30
_SAME = "an operator gives all nodes the same users (fedmoe operator refresh)"


def access_checks(connection: Connection) -> list[Check]:
    """The checks of TLS, and of the users if this user may list them; the connection has been used before."""
    checks = []
    if connection.certificate_ends is not None:
        checks.append(certificate_check(connection.certificate_ends, now=time.time()))
    users = Users(connection)
    try:
        there = users.parties()
        if odd := users.differences():
            checks += odd
        elif there:
            checks.append(Check(OK, "users", f"{len(there)} enrolled, the same on every master and replica"))
        less, more = users.outdated()
        checks += [Check(level, "users", text) for level, text in ((FAIL, less), (WARN, more)) if text]
        checks += default_checks(users.defaults(), is_secured=bool(there))
    except RedisUnavailableError:  # not an operator
        pass
    return checks


def default_checks(rules: Mapping[str, set[str]], *, is_secured: bool) -> list[Check]:
    """Judge the user `default` by its rules on each node. Pure.

    Args:
        rules: {node: rules}.
        is_secured: parties are enrolled.
    """
    checks = []
    forgets = [
        node
        for node, found in rules.items()
        if not {"~*", "+@all"} <= found or any(rule.startswith("-") for rule in found)
    ]
    if forgets:
        checks.append(
            Check(
                FAIL,
                "users",
                f"on {', '.join(forgets)} the user default lacks rights, and with its rights Redis loads transactions "
                "from its append-only file: a restart may lose everything. In its ACL file or redis.conf the line must "
                f"be `{DEFAULT_USER}`; nobody can log in as it",
            )
        )
    opened = [node for node, found in rules.items() if {"on", "nopass"} <= found]
    if opened and is_secured:
        checks.append(
            Check(
                WARN,
                "users",
                f"on {', '.join(opened)} anybody who reaches Redis may do everything, because the user default needs "
                f"no password: in its ACL file or redis.conf the line must be `{DEFAULT_USER}`",
            )
        )
    return checks


def node_rights_checks(connection: Connection, roles: Mapping[str, tuple[Right, ...]]) -> list[Check]:
    """Whether this user has the rights of these roles on every other node, as any replica may become a master."""
    if not roles:
        return []
    try:
        others = other_nodes(connection)
    except RedisUnavailableError as error:
        return [Check(WARN, "permissions", f"the rights on replicas are not known: {error}")]
    checks = []
    for node in others:
        try:
            lacks = [
                str(lack)
                for rights in roles.values()
                for lack in lacking(connection.to(node), rights)
                if not lack.right.without
            ]
        except RedisUnavailableError as error:
            level = FAIL if error.about == "login" else WARN
            does = f": {_SAME}" if error.about == "login" else ""
            checks.append(
                Check(level, "permissions", f"the rights on {text_of(node)} are not known: {error}{does}")
            )
            continue
        if lacks:
            checks.append(
                Check(
                    FAIL,
                    "permissions",
                    f"this user lacks {', '.join(dict.fromkeys(lacks))} on {text_of(node)}: {_SAME}",
                )
            )
    same = [Check(OK, "permissions", f"the same on all {len(others) + 1} nodes")] if others else []
    return checks or same


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
