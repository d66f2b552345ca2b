"""Writes a deployment directory: all that the machine of Redis and the parties of a new federation need."""

import ipaddress
import json
import re
import secrets
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

from fedmoe.errors import SettingsError
from fedmoe.protocol.keys import Keys
from fedmoe.protocol.parties import Party
from fedmoe.store.audit import ENROLLED, INIT, AuditLine, utc
from fedmoe.store.permissions import DEFAULT_USER, party_rules
from fedmoe.store.users import password_rule
from fedmoe.tools.deploy.certificates import LOOPBACK, Pair, fits, hosts_of, make_authority, make_server
from fedmoe.tools.deploy.files import enrolment_text, write_private
from fedmoe.tools.deploy.parties import (
    ENROLMENTS,
    SECRET_BYTES,
    SETTINGS,
    check_files,
    make_empty,
    new_enrolment,
    parties,
    settings_text,
)

CONF, USERS, AUDIT, TLS = "redis.conf", "users.acl", "audit.jsonl", "tls"
REPLICA = "replica"  # the user by which a replica follows its master
_HOST = re.compile(r"(?!.{254})[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*")
_LOCAL = "bind 127.0.0.1 -::1\nport 6379\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A new federation's deployment.

    Args:
        directory: of the deployment; it must be empty, or not be there.
        hosts: names and addresses by which other machines reach Redis; the first one stands in the enrolment files.
        port: of Redis.
        prefix: of the federation's keys.
        workers: the workers to enrol at once.
        redis_dir: where redis.conf, users.acl and tls will lie on the machine of Redis; None for `directory`.

    Raises:
        SettingsError: for a host or a name that cannot be used.
    """

    directory: Path
    hosts: Sequence[str]
    port: int = 6379
    prefix: str = "fedmoe"
    workers: Sequence[Party] = ()
    redis_dir: Path | None = None

    def __post_init__(self) -> None:
        Keys(self.prefix)
        for host in self.hosts:
            check_host(host)
        if self.redis_dir is not None and not self.redis_dir.is_absolute():
            raise SettingsError(
                f"--redis-dir {str(self.redis_dir)!r} must begin with /: Redis may start elsewhere",
                about="redis_dir",
            )
        check_files(self.workers)

    @property
    def url(self) -> str:
        """The URL in the enrolment files."""
        host = f"[{self.hosts[0]}]" if ":" in self.hosts[0] else self.hosts[0]
        return f"rediss://{host}:{self.port}/0"

    @property
    def parties(self) -> dict[str, Party]:
        """Every party, by the name of its file."""
        return parties(self.workers)

    def write(self, *, now: float) -> None:
        """Write all files; `now` is the Unix time for the audit log.

        Raises:
            SettingsError: if the directory is not empty or cannot be written.
        """
        make_empty(self.directory)
        for name in (ENROLMENTS, TLS):
            (self.directory / name).mkdir(mode=0o700)
        authority = make_authority(f"FedMoE {self.prefix}")
        self._write_pair("ca", authority)
        self._write_pair("redis", make_server(authority, [*self.hosts, *LOOPBACK]))
        users, audit = [DEFAULT_USER], []
        for file, party in self.parties.items():
            enrolled = new_enrolment(party, url=self.url, prefix=self.prefix, ca=authority.certificate)
            write_private(self.directory / ENROLMENTS / file, enrolment_text(enrolled, party))
            rules = " ".join(party_rules(party, Keys(self.prefix)))
            users.append(f"user {enrolled.user} on {password_rule(enrolled.password)} {rules}")
            line = AuditLine(what=ENROLLED, party=str(party), by=INIT, host=socket.gethostname(), at=utc(now))
            audit.append(json.dumps(asdict(line)))
        link = secrets.token_urlsafe(SECRET_BYTES)
        users.append(
            f"user {REPLICA} on {password_rule(link)} resetkeys resetchannels -@all +psync +replconf +ping"
        )
        write_private(self.directory / USERS, "\n".join(users) + "\n")
        write_private(self.directory / AUDIT, "\n".join(audit) + "\n")
        write_private(self.directory / CONF, self._conf(link))
        write_private(self.directory / SETTINGS, settings_text(self.directory, self.workers))

    def _write_pair(self, name: str, pair: Pair) -> None:
        write_private(self.directory / TLS / f"{name}.crt", pair.certificate)
        write_private(self.directory / TLS / f"{name}.key", pair.key)

    def _conf(self, link: str) -> str:
        """ops/redis.conf for all machines, by TLS and with users; paths are relative to `dir`."""
        text = (files("fedmoe.tools.deploy") / "redis.conf").read_text(encoding="utf-8")
        before, found, after = text.partition(_LOCAL)
        assert found, "redis.conf has no such lines"
        before = before[: before.index("# Only this machine")]
        return f"""{before}# From all machines, by TLS only; {USERS} says who may connect.
bind * -::*
port 0
tls-port {self.port}
dir {_conf_word(self.redis_dir or self.directory.resolve())}
# Redis writes it again when somebody is enrolled, readable by all unless its umask is 077: keep this directory closed.
aclfile {USERS}
tls-cert-file {TLS}/redis.crt
tls-key-file {TLS}/redis.key
tls-ca-cert-file {TLS}/ca.crt
# Take client certificates that the CA signed; with `yes`, everybody needs one.
tls-auth-clients optional
tls-protocols "TLSv1.2 TLSv1.3"
# A replica on another machine has a copy of this file, {USERS} and {TLS} (without ca.key), its own `dir`, and one more
# line: replicaof HOST {self.port}
tls-replication yes
masteruser {REPLICA}
masterauth {link}
{after}"""


def check_host(host: str) -> None:
    """Raise SettingsError unless this is a host name or an IP address, without a port."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not _HOST.fullmatch(host):
            raise SettingsError(
                f"{host!r} is neither a host name nor an IP address (the port is --port)", about="host"
            ) from None


def renew(directory: Path, hosts: Sequence[str]) -> list[str]:
    """Replace the server's certificate by a new one, for its present hosts and these; all its hosts.

    Raises:
        SettingsError: for a host that cannot be used, or if the directory is no deployment or has no CA's key.
    """
    for host in hosts:
        check_host(host)
    authority = read_authority(directory)
    place = directory / TLS
    try:
        old = hosts_of((place / "redis.crt").read_text())
    except (OSError, ValueError):
        if not hosts:
            raise SettingsError(
                f"{str(place / 'redis.crt')!r} cannot be read, so its hosts are not known: name each of them (--host)",
                about="host",
            ) from None
        old = list(LOOPBACK)
    found = list(dict.fromkeys([*hosts, *old]))
    pair = make_server(authority, found)
    write_private(place / "redis.key", pair.key, replace=True)
    write_private(place / "redis.crt", pair.certificate, replace=True)
    return found


def first_lines(enrolment: Path | None) -> list[AuditLine]:
    """What `fedmoe init` noted in the deployment in which this enrolment file lies; nothing if it lies in none."""
    if enrolment is None or (place := enrolment.resolve().parent).name != ENROLMENTS:
        return []
    try:
        noted = [json.loads(line) for line in (place.parent / AUDIT).read_text(encoding="utf-8").splitlines()]
        return [AuditLine(**words) for words in noted]
    except (OSError, ValueError, TypeError):  # it was moved or changed: nobody depends on it
        return []


def read_authority(directory: Path) -> Pair:
    """The deployment's CA; raises SettingsError if it cannot be read."""
    try:
        pair = [(directory / TLS / f"ca.{end}").read_text() for end in ("crt", "key")]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "") or "it is not a text"
        raise SettingsError(
            f"{str(directory)!r} has no certificate authority ({TLS}/ca.crt and {TLS}/ca.key: {why}): name the "
            "directory that `fedmoe init` wrote",
            about="deployment",
        ) from error
    authority = Pair(certificate=pair[0], key=pair[1])
    if not fits(authority):
        raise SettingsError(
            f"{TLS}/ca.key in {str(directory)!r} is not the key of {TLS}/ca.crt, or one of them is damaged: put back "
            "the files that `fedmoe init` wrote",
            about="deployment",
        )
    return authority


def _conf_word(path: Path) -> str:
    """A path as one word of redis.conf."""
    text = str(path)
    if re.fullmatch(r"[\w./-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
