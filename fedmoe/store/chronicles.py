"""Reads the lines of all experts, each look only those that came since the last one; a monitoring user is enough."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedmoe.protocol.chronicle import KEPT_REFUSALS, KEPT_STEPS, Chronicle, RawLine
from fedmoe.store.connection import Connection
from fedmoe.store.reading import Command, ask


@dataclass(slots=True)
class _Known:
    """What is known of one expert: its lineage, its lines, and the newest id of each of its streams."""

    lineage: str
    chronicle: Chronicle = field(default_factory=Chronicle)
    newest: dict[str, bytes] = field(default_factory=dict)


class Chronicles:
    """The chronicle of each expert, kept up to date over one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._known: dict[str, _Known] = {}

    def read(self, lineages: Mapping[str, str]) -> dict[str, Chronicle]:
        """The chronicles of these experts, by name; `lineages` maps a name to its lineage.

        If the lineage of an expert has changed, its whole chronicle is read again.

        Raises:
            RedisUnavailableError: if Redis does not reply.
        """
        known = {name: one for name, one in self._known.items() if lineages.get(name) == one.lineage}
        self._known = {name: known.get(name) or _Known(lineage) for name, lineage in lineages.items()}
        commands: dict[tuple[str, str], Command] = {}
        for name, one in self._known.items():
            keys = self._connection.keys.expert(name)
            for what, key, most in (("log", keys.log, KEPT_STEPS), ("dead", keys.dead, KEPT_REFUSALS)):
                newest = one.newest.get(what)
                since = b"-" if newest is None else b"(" + newest
                commands[name, what] = ("XREVRANGE", key, "+", since, "COUNT", most)
        for (name, what), reply in ask(self._connection, commands).items():
            if not isinstance(reply, Exception):  # the status names it
                self._add(self._known[name], what, reply[::-1])
        return {name: one.chronicle for name, one in self._known.items()}

    def _add(self, one: _Known, what: str, lines: list[RawLine]) -> None:
        if not lines:
            return
        one.newest[what] = lines[-1][0]
        if what == "log":
            one.chronicle.add_log(lines)
        else:
            one.chronicle.add_refusals(lines)
