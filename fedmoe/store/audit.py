"""The audit log: who enrolled or revoked whom, and when.

Only operators reach it. They cannot delete the key, but XADD with MAXLEN would remove lines: Redis knows no such right.
"""

import socket
import time
from dataclasses import dataclass

from fedmoe.protocol.fields import from_untrusted
from fedmoe.protocol.parties import Party
from fedmoe.store.connection import Connection

SHOWN = 1000
ENROLLED, ROTATED, REVOKED, REFRESHED = "enrolled", "rotated", "revoked", "refreshed"
PREPARED = "prepared"  # the line of an ACL file, for the server's administrator
ALL = "all"  # parties


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditLine:
    """One line: what was done to which party, by which Redis user, from which host.

    Args:
        at: RFC 3339 time, by the server's clock.
        what: enrolled, rotated (a new password), prepared (its user is for the server's administrator to create),
            revoked or refreshed (the rights of all).
    """

    what: str = ""
    party: str = ""
    by: str = ""
    host: str = ""
    at: str = ""


def write_line(connection: Connection, what: str, party: Party | str) -> None:
    """Add a line; raises RedisUnavailableError if it cannot be added."""
    connection = connection.at(connection.keys.audit)
    with connection.errors():
        by = str(connection.client.execute_command("ACL WHOAMI"))
        words = {"what": what, "party": str(party), "by": by, "host": socket.gethostname()}
        connection.client.xadd(connection.keys.audit, words)


def read_lines(connection: Connection) -> list[AuditLine]:
    """The newest lines, the oldest of them first; raises RedisUnavailableError."""
    connection = connection.at(connection.keys.audit)
    with connection.errors():
        entries = connection.client.xrevrange(connection.keys.audit, count=SHOWN)
    return [
        from_untrusted(AuditLine, fields | {b"at": utc(int(entry.split(b"-")[0]) / 1000)})
        for entry, fields in reversed(entries)
    ]


def utc(at: float) -> str:
    """A Unix time as RFC 3339."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
