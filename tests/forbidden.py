"""What each role may not do: `python -m tests.forbidden` prints it, by role."""

from collections.abc import Iterator

from fedmoe.protocol.keys import Keys
from fedmoe.protocol.parties import Party
from fedmoe.settings import RedisSettings
from fedmoe.store.client import Words
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.permissions import Right, party_rights
from fedmoe.store.rights import words

KEYS = Keys()
EXPERT, NAME = "sql_expert", "w1"
PARTIES = (
    Party(role="worker", expert=EXPERT, name=NAME),
    Party(role="aggregator"),
    Party(role="monitor"),
    Party(role="operator"),
)
# A login needs no right. They change the connection, so they cannot be tried among others.
ALWAYS = {"auth", "hello", "quit", "reset"}
NOT_THERE = "fedmoe:no-such-key"


def of_the_server(admin: Connection, party: Party) -> list[Words]:
    """Every command and subcommand that this server has and the party's list lacks, with enough arguments."""
    listed = {right.command.lower() for right in party_rights(party, KEYS)}
    tried: list[Words] = []
    for name, arity in _commands(admin):
        if name not in listed | ALWAYS:
            first = name.split("|") if "|" in name else name.split()
            tried.append([*first, *[NOT_THERE] * max(0, abs(arity) - len(first))])
    return tried


def _commands(admin: Connection) -> Iterator[tuple[str, int]]:
    """Name, like `config get`, and arity of every command that can be run by itself."""
    for one in admin.client.execute_command("COMMAND", "INFO").values():
        name, subcommands = one["name"], one.get("subcommands") or []
        if not subcommands:
            yield name, one["arity"]
        for sub in subcommands:
            yield bytes(sub[0]).decode().replace("|", " "), sub[1]


def of_others(party: Party) -> list[Words]:
    """The party's own commands on keys that it must not touch in this way."""
    expert, other = KEYS.expert(EXPERT), KEYS.expert("docs_expert")
    strangers = [KEYS.experts, KEYS.audit, "fedmoe2:experts", "other", "fedmoe:{docs_expert}x:meta"]
    if party.role == "worker":
        strangers += [
            other.updates, other.spec, other.meta, other.weights, other.worker(NAME), other.payloads(NAME)[:-1] + "1",
            expert.worker("w2"), expert.worker("w1x"), expert.trace("w2"), expert.header("w2", "1-0", 1),
            expert.incarnation("w2"), expert.header("w1x", "1-0", 1), expert.log, expert.dead, expert.lost,
            expert.claims, expert.vectors, expert.server_state, expert.problem, expert.lease, expert.meta,
            expert.spec, expert.weights, expert.packed, expert.decided, expert.updates,
            KEYS.merged.weights, KEYS.merged.meta, KEYS.merged.lease,
        ]  # fmt: skip
    else:
        strangers += [
            expert.worker("w1"),
            expert.lease,
            expert.updates,
            expert.spec,
            expert.weights,
            expert.log,
        ]
    rights = party_rights(party, KEYS)
    return [
        words(Right(command=command, keys=(key,)))
        for command in sorted({right.command for right in rights if right.keys})
        for key in strangers
        if not any(right.command == command and _matches(key, right.keys) for right in rights)
        and not _is_shared_read(command, key, rights)
    ]


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    from fnmatch import fnmatchcase

    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _is_shared_read(command: str, key: str, rights: tuple[Right, ...]) -> bool:
    """True if the rules allow it beyond the list: the root's commands work on all keys of the root in one mode."""
    from fedmoe.store.permissions import READS

    shared = [right for right in rights if not right.alone]
    if command not in {right.command for right in shared}:
        return False
    touched = [right for right in shared if _matches(key, right.keys)]
    reads = READS | {"XREADGROUP"}  # of its stream, as servers see it
    return any(command in reads or right.command not in READS for right in touched)


def main() -> None:
    """Print what is tried on the server of this machine."""
    with EmbeddedRedis(options=["--appendonly", "no"]) as server:
        admin = Connection(RedisSettings(url=server.url))
        for party in PARTIES:
            tried = [*of_the_server(admin, party), *of_others(party)]
            print(f"{party.role}: {len(tried)} forbidden commands")
            for command in tried:
                print("   ", *(str(word) for word in command))


if __name__ == "__main__":
    main()
