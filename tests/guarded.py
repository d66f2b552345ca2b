"""A server on which every role has exactly the rights that are listed for it, and all that is sent is recorded."""

from contextlib import ExitStack

from click.testing import CliRunner

from fedmoe.cli.main import cli
from fedmoe.errors import FedMoEError
from fedmoe.protocol.keys import Keys
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.permissions import AGGREGATOR, ANY, OPERATOR, ROLES, WORKER, Right, Role, acl_rules
from tests.proxy import Proxy
from tests.recorder import Recorder, ScriptRecorder

KEYS = Keys()
EXPERT, NAME = "sql_expert", "w1"


def rights_of(role: Role) -> tuple[Right, ...]:
    """Of the role's user in these tests."""
    return role.rights(KEYS, EXPERT if role is WORKER else ANY, NAME)


class Guarded:
    """A server on which each role is a user with exactly its rights, behind a proxy that records what it sends."""

    def __init__(self, own: EmbeddedRedis, stack: ExitStack) -> None:
        self.admin = Connection(RedisSettings(url=own.url))
        stack.callback(self.admin.close)
        self.recorders = {name: Recorder() for name in ROLES}
        self.urls = {}
        for name, role in ROLES.items():
            self.admin.client.execute_command(
                "ACL", "SETUSER", name, "on", ">pw", *acl_rules(rights_of(role))
            )
            proxy = stack.enter_context(Proxy(own.socket))
            proxy.tap = self.recorders[name].tap
            self.urls[name] = proxy.url.replace("redis://", f"redis://{name}:pw@")
        self.scripts = stack.enter_context(ScriptRecorder(own.socket))

    def settings(self, role: Role) -> RedisSettings:
        return RedisSettings(url=self.urls[role.name])

    def connection(self, role: Role) -> Connection:
        return Connection(self.settings(role))

    def fedmoe(self, role: Role, *command: str) -> str:
        """Run a command as the role's user; its output."""
        done = CliRunner().invoke(cli, [*command, "--redis", self.urls[role.name]])
        if isinstance(done.exception, FedMoEError):
            raise done.exception
        assert done.exit_code == 0, done.output or done.exception
        return str(done.output)

    def sent(self, role: Role) -> set[tuple[str, str]]:
        """What the role sent so far, inner commands of scripts among it; most of those are the aggregator's."""
        return self.recorders[role.name].sent | (self.scripts.sent if role is AGGREGATOR else set())

    def may_have_sent(self, role: Role) -> set[tuple[str, str]]:
        """The same, and the inner commands of scripts whose sender nobody knows: an operator runs some of them."""
        return self.sent(role) | (self.scripts.sent if role is OPERATOR else set())

    def denied(self) -> list[str]:
        """What the server refused, all users together."""
        log = self.admin.client.execute_command("ACL", "LOG")
        entries = [dict(zip(entry[::2], entry[1::2], strict=True)) for entry in log]
        refused = [f"{entry[b'username'].decode()} {entry[b'object'].decode()}" for entry in entries]
        return [text for text in refused if not text.endswith("client|setinfo")]
