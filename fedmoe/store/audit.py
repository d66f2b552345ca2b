"""The audit log: who enrolled or revoked whom, and when.

Only operators reach it. They cannot delete the key, but XADD with MAXLEN would remove lines: Redis knows no such right.
"""

import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fedmoe.protocol.fields import from_untrusted
from fedmoe.protocol.parties import Party
from fedmoe.store.connection import Connection

PAGE = 1000  # lines read at once
ENROLLED, ROTATED, REVOKED, REFRESHED = "enrolled", "rotated", "revoked", "refreshed"
PREPARED = "prepared"  # the line of an ACL file, for the server's administrator
ALL = "all"  # parties
INIT = "fedmoe init"  # who enrolled the first parties: Redis did not run yet


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditLine:
    """One line: what was done to which party, by which Redis user, from which host.

    Args:
        at: RFC 3339 time, by the server's clock; of what `fedmoe init` did, by the clock of its machine.
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


def add_missing(connection: Connection, lines: Sequence[AuditLine]) -> None:
    """Add those of these lines that are not there; raises RedisUnavailableError if they cannot be added."""
    there = read_lines(connection) if lines else []
    connection = connection.at(connection.keys.audit)
    with connection.errors():
        for line in lines:
            if line not in there:
                connection.client.xadd(connection.keys.audit, asdict(line))


def read_lines(connection: Connection) -> list[AuditLine]:
    """All lines, the oldest first; raises RedisUnavailableError."""
    connection = connection.at(connection.keys.audit)
    lines: list[AuditLine] = []
    newest = "+"
    with connection.errors():
        while entries := connection.client.xrevrange(connection.keys.audit, newest, count=PAGE):
            for entry, fields in entries:
                at = utc(int(entry.split(b"-")[0]) / 1000)
                lines.append(from_untrusted(AuditLine, {b"at": at} | fields))
            newest = f"({entries[-1][0].decode()}"
    lines.reverse()
    return sorted(lines, key=lambda line: line.at)


def utc(at: float) -> str:
    """A Unix time as RFC 3339."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
