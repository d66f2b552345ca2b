"""A run over TLS: each process has an enrolment file, and the proxy carries bytes that it cannot read."""

from dataclasses import dataclass
from pathlib import Path

from fedmoe.protocol.parties import Party
from fedmoe.store.permissions import DEFAULT_USER
from fedmoe.tools.deploy.deployment import ENROLMENTS, TLS, USERS, Deployment
from tests.chaos.actors import WORKERS
from tests.ports import free_port
from tests.proxy import Proxy
from tests.secured import tls_program

ADMIN = "user default on nopass ~* &* +@all"  # on the socket, for who makes the faults


@dataclass(frozen=True)
class Secured:
    """What a run over TLS needs.

    Args:
        server: path of a server with TLS.
        options: for it.
        proxy: in front of its TLS port.
        enrolments: directory with a file for each process.
    """

    server: str
    options: tuple[str, ...]
    proxy: Proxy
    enrolments: Path


def secure(directory: Path) -> Secured:
    """Write the deployment of a run into an empty directory; raises LookupError if no server here has TLS."""
    server = tls_program()
    if not server:
        raise LookupError("no server with TLS on this machine: install redis-server")
    tls_port = free_port()
    proxy = Proxy(("127.0.0.1", tls_port))
    workers = tuple(Party(role="worker", expert=expert, name=name) for name, expert in WORKERS.items())
    deployment = Deployment(directory=directory, hosts=["127.0.0.1"], port=proxy.port, workers=workers)
    deployment.write(now=0.0)
    users = directory / USERS
    users.write_text(users.read_text().replace(DEFAULT_USER, ADMIN))
    options = (
        "--tls-port", str(tls_port), "--bind", "127.0.0.1", "--aclfile", str(users), "--tls-auth-clients", "no",
        "--tls-cert-file", str(directory / TLS / "redis.crt"), "--tls-key-file", str(directory / TLS / "redis.key"),
        "--tls-ca-cert-file", str(directory / TLS / "ca.crt"),
    )  # fmt: skip
    return Secured(server, options, proxy, directory / ENROLMENTS)
