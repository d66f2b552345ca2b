"""Everything that a server can do and a role need not is refused: with the generated rules, on a real server.

`python -m tests.forbidden` prints what is tried.
"""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from fedmoe.protocol.parties import Party
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.permissions import party_rights, party_rules
from fedmoe.store.rights import lacking, words
from tests.forbidden import KEYS, PARTIES, of_others, of_the_server

AT_LEAST = 200
# The rules alone must refuse them, whatever else would.
OPTIONS = ["--appendonly", "no", "--enable-debug-command", "yes", "--enable-module-command", "yes"]


@pytest.fixture
def own(server: EmbeddedRedis) -> Iterator[EmbeddedRedis]:
    """A server on which each party is a user with the generated rules, and nothing else."""
    with ExitStack() as stack:
        running = stack.enter_context(EmbeddedRedis(server=server.server, options=OPTIONS))
        admin = Connection(RedisSettings(url=running.url))
        stack.callback(admin.close)
        for party in PARTIES:
            rules = ["reset", "on", ">pw", *party_rules(party, KEYS)]
            admin.client.execute_command("ACL SETUSER", party.user(KEYS.prefix), *rules)
        yield running


def connection_of(own: EmbeddedRedis, party: Party) -> Connection:
    user = party.user(KEYS.prefix).replace(":", "%3A")
    return Connection(RedisSettings(url=own.url.replace("unix://", f"unix://{user}:pw@")))


@pytest.mark.parametrize("party", PARTIES, ids=lambda party: party.role)
def test_what_a_role_need_not_do_is_refused(own: EmbeddedRedis, party: Party) -> None:
    """Each command of the server that is not on the role's list, and its own commands on the keys of others."""
    admin = Connection(RedisSettings(url=own.url))
    tried = [*of_the_server(admin, party), *of_others(party)]
    assert len(tried) >= AT_LEAST
    connection = connection_of(own, party)
    replies = list(connection.stream(tried, ahead=1))
    allowed = [
        " ".join(map(str, command))
        for command, reply in zip(tried, replies, strict=True)
        if "NOPERM" not in str(reply) and "no permissions" not in str(reply).lower()
    ]
    assert allowed == []
    assert admin.client.dbsize() == 0


@pytest.mark.parametrize("party", PARTIES, ids=lambda party: party.role)
def test_what_a_role_needs_is_allowed(own: EmbeddedRedis, party: Party) -> None:
    """So the test above does not pass because everything is refused."""
    rights = party_rights(party, KEYS)
    assert rights
    assert lacking(connection_of(own, party), rights) == []
    assert {" ".join(words(right)[:1]).upper() for right in rights} & {"INFO", "SCAN"}
