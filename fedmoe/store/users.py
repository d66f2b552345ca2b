"""The users of a federation on every master and replica: ACLs are each node's own.

On a Redis Cluster, "the master" is the one that has the list of experts.

Redis keeps hashes of passwords only, so nothing here can give a password away.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress

from fedmoe.errors import RedisUnavailableError, RedisUnfitError
from fedmoe.protocol.keys import Keys
from fedmoe.protocol.parties import Party
from fedmoe.store.connection import Connection
from fedmoe.store.nodes import other_nodes
from fedmoe.store.permissions import Right, party_rules
from fedmoe.store.rights import lacking
from fedmoe.store.url import text_of
from fedmoe.store.user import User
from fedmoe.util.check import FAIL, WARN, Check

_NO_FILE = "not configured to use an ACL file"
SHOWN = 3  # users, and rights of each, in a sentence


def password_rule(password: str) -> str:
    """The ACL rule that sets this password, by its hash."""
    return f"#{hashlib.sha256(password.encode()).hexdigest()}"


class Users:
    """The users of a federation, on the master and its replicas.

    Args:
        connection: of an operator, to the master.
        keys: of the federation whose users these are; the connection's own by default.
    """

    def __init__(self, connection: Connection, keys: Keys | None = None) -> None:
        self.connection, self._keys = connection, keys or connection.keys
        self.notes: list[str] = []  # what is not as it should be after a change, each once
        self.has_file = True  # False after a change that a node cannot save, because it has no ACL file

    def parties(self) -> dict[Party, User]:
        """The users on the master.

        Raises:
            RedisUnavailableError: if Redis cannot be reached or this user may not list them.
        """
        return self._list(self.connection)

    def _list(self, node: Connection) -> dict[Party, User]:
        with node.errors():
            lines = [str(line) for line in node.client.execute_command("ACL LIST")]
        prefix = self._keys.prefix
        found = {party: line for line in lines if (party := Party.of_user(line.split(" ", 2)[1], prefix))}
        return {party: User.parse(party, found[party]) for party in sorted(found)}

    def defaults(self) -> dict[str, set[str]]:
        """The rules of the server's user `default` on each node that answers: {node: rules}."""
        found = {}
        for address, node in self._nodes():
            with suppress(RedisUnavailableError):  # `differences` names it
                try:
                    with node.errors():
                        lines = [str(line).split() for line in node.client.execute_command("ACL LIST")]
                finally:
                    if node is not self.connection:
                        node.close()
                found[address] = {rule for line in lines if line[1] == "default" for rule in line[2:]}
        return found

    def own_name(self) -> str:
        """The name of this connection's user."""
        with self.connection.errors():
            return str(self.connection.client.execute_command("ACL WHOAMI"))

    def may_enrol(self) -> bool:
        """False if this server does not let this user change users."""
        needed = [Right(command="MULTI"), Right(command="EXEC"), Right(command="ACL SETUSER")]
        return not lacking(self.connection, needed)

    def may_list(self) -> bool:
        """False if this server does not let this user list users."""
        return not lacking(self.connection, [Right(command="ACL LIST")])

    def line(self, party: Party, hashes: tuple[str, ...] = ()) -> str:
        """The line of an ACL file for a party's user, with these passwords."""
        return " ".join(["user", party.user(self._keys.prefix), *self._rules(party, hashes)])

    def _rules(self, party: Party, hashes: tuple[str, ...]) -> list[str]:
        database = self.connection.client.get_connection_kwargs().get("db") or 0
        cluster = self.connection.cluster is not None
        return ["reset", "on", *hashes, *party_rules(party, self._keys, database=database, cluster=cluster)]

    def set(self, party: Party, hashes: tuple[str, ...]) -> None:
        """Create or change a party's user on every node: these passwords, and the rights of its role."""
        self._on_each(lambda node: self._set(node, party, hashes))

    def _set(self, node: Connection, party: Party, hashes: tuple[str, ...]) -> None:
        user = party.user(self._keys.prefix)
        with node.errors():
            node.client.execute_command("ACL SETUSER", user, *self._rules(party, hashes))
        self._save(node)

    def remove(self, party: Party) -> bool:
        """Remove a party's user from every node, which cuts its connections; False if no node had it."""
        removed = 0

        def remove(node: Connection) -> None:
            nonlocal removed
            with node.errors():
                removed += node.client.execute_command("ACL DELUSER", party.user(self._keys.prefix))
            self._save(node)

        self._on_each(remove)
        return removed > 0

    def refresh(self) -> int:
        """Give every user the present rights of its role, on every node, and make all nodes equal to the master.

        Returns:
            The number of users.
        """
        there = self.parties()

        def equal(node: Connection) -> None:
            for party in self._list(node).keys() - there.keys():
                with node.errors():
                    node.client.execute_command("ACL DELUSER", party.user(self._keys.prefix))
            for party, user in there.items():
                self._set(node, party, user.hashes)

        self._on_each(equal)
        return len(there)

    def differences(self) -> list[Check]:
        """A check for each replica whose users are not those of the master, or that cannot be asked.

        One that is not asked, because the password would go over the network as plain text, is a warning: it may be as
        it should be.
        """
        there, found = self.parties(), []
        for address, node in self._nodes():
            if node is self.connection:
                continue
            with closing(node):
                try:
                    users = self._list(node)
                except RedisUnavailableError as error:
                    level = WARN if error.about == "insecure" else FAIL
                    found.append(Check(level, "users", f"the users on {address} are not known: {error}"))
                    continue
            parties = users.keys() | there.keys()
            odd = [one for one in sorted(parties) if users.get(one) != there.get(one)]
            if odd:
                found.append(
                    Check(
                        FAIL,
                        "users",
                        f"users on {address} differ from the master's ({_few(map(str, odd))}): run `fedmoe operator "
                        "refresh`",
                    )
                )
        return found

    def outdated(self) -> tuple[str, str]:
        """Whose rights are not those that this release gives to its role: two sentences, "" if there are none.

        Returns:
            Who lacks rights, and who has more.
        """
        lacking, surplus = [], []
        for party, user in self.parties().items():
            right = User.parse(party, self.line(party)).rights
            if lacks := sorted(right - user.rights):
                lacking.append(f"{party}: {_few(lacks)}")
            if more := sorted(user.rights - right):
                surplus.append(f"{party}: {_few(more)}")
        return (
            f"users lack rights that this release gives to their roles ({_few(lacking, '; ')}): run `fedmoe operator "
            "refresh`" if lacking else "",
            f"users have rights that this release does not give to their roles ({_few(surplus, '; ')}): run `fedmoe "
            "operator refresh`, unless a later release gave them" if surplus else "",
        )  # fmt: skip

    def _save(self, node: Connection) -> None:
        try:
            with node.errors():
                node.client.execute_command("ACL SAVE")
        except RedisUnavailableError as error:
            if _NO_FILE in str(error.__cause__):
                self.has_file = False
            else:
                self._note(f"the server could not save its users, they last until it restarts ({error})")

    def keep_by_hand(self, how: str) -> str:
        """A sentence on how the server's administrator keeps a change, if a node has no ACL file; else ""."""
        if self.has_file:
            return ""
        return f"the server has no ACL file (aclfile), so its users last until it restarts: {how}"

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _on_each(self, change: Callable[[Connection], None]) -> None:
        """Change each node, the master first, whose errors are raised; a replica that fails is noted."""
        for address, node in self._nodes():
            if node is self.connection:
                change(node)
                continue
            with closing(node):
                try:
                    change(node)
                except RedisUnavailableError as error:
                    self._note(
                        f"NOT done on {address} ({error}): run `fedmoe operator refresh` as soon as it is back"
                    )

    def _nodes(self) -> Iterator[tuple[str, Connection]]:
        """The address of each node, and a connection to it."""
        replicas = other_nodes(self.connection)  # an error here leaves all as it was: nothing is changed yet
        yield "the master", self.connection
        for host, port in replicas:
            yield text_of((host, port)), Connection(self.connection.settings, node=(host, port))


def _few(texts: Iterable[str], between: str = ", ") -> str:
    """The first texts, and how many more there are."""
    shown = list(texts)
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return between.join(shown[:SHOWN]) + more


def require_master(users: Users) -> None:
    """Raise RedisUnfitError on a replica: only that one node would be changed, and the master would not know."""
    with users.connection.errors():
        role = users.connection.client.info("replication").get("role")
    if role == "slave":
        raise RedisUnfitError(
            f"Redis at {users.connection.settings.shown} is a replica, and users are changed from the master on: use "
            "an enrolment with the master's URL",
            about="replica",
        )


def require_users(users: Users) -> None:
    """Raise RedisUnfitError, which says what to do, if this server does not let this user change users."""
    if not users.may_enrol():
        raise RedisUnfitError(
            f"Redis at {users.connection.settings.shown} does not let this user change users: connect as an operator, "
            "or remove the user in the server's own console",
            about="rights",
        )
