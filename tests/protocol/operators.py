"""Operators as step machines: one who changes the rules or holds the expert, and one who rolls it back."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import fedmoe.store.change
import fedmoe.store.rollback
from fedmoe.errors import FedMoEError, StaleStateError
from fedmoe.protocol.rules import NESTEROV
from fedmoe.protocol.spec import Spec
from fedmoe.store.change import hold, release
from fedmoe.store.rollback import VersionState, parts_written, prepare
from tests.protocol.actors import NEW_ID, NEW_LR, ModelConnection, Rules, told_damage
from tests.protocol.client import Client, Port
from tests.protocol.world import NAME, Db, Reply, Suspended

WRONG = "operator finds damage where none is"


@contextmanager
def replaced(rules: Rules, module: Any, port: Port) -> Iterator[None]:
    """Ids of commits from the search, and what the rules replace."""
    with ExitStack() as all_of_it:
        for where in (*rules.patches, (module, "new_id", lambda: str(port.ask(NEW_ID)[0]))):
            all_of_it.enter_context(patch.object(*where))
        yield


class Operator:
    """An operator who, once told to, changes the rules, or holds the expert and releases it, until it is done.

    IDLE, then WANTS, then DONE; or IDLE, then HOLDS, then RELEASES, then DONE.
    """

    IDLE, WANTS, DONE = "idle", "wants to change the rules", "is done"
    HOLDS, RELEASES = "wants to hold the expert", "wants to release the expert"

    def __init__(self, rules: Rules) -> None:
        self.name = "operator"
        self.first = self.IDLE
        self._rules = rules

    def choices(self, memory: str, db: Db) -> tuple[int, ...]:
        """Nothing but to go on with a change."""
        return (0,) if memory not in (self.IDLE, self.DONE) else ()

    def fair_choice(self, memory: str) -> int:
        return 0

    def check(self, memory: str) -> str:
        """Only what it was told: an operator knows nothing that could be wrong."""
        return memory if memory.startswith(WRONG) else ""

    def turn(self, memory: str, replies: Sequence[Reply], choice: int) -> str:
        """`fedmoe expert set`, `hold` or `release`, tried once."""
        if memory in (self.IDLE, self.DONE) or self.check(memory):
            return memory
        port = Port(replies)
        store = self._rules.expert_store(ModelConnection(Client(port)), NAME)
        with replaced(self._rules, fedmoe.store.change, port):
            try:
                match memory:
                    case self.WANTS:
                        self._rules.change(store, {"lr": NEW_LR}, clock=lambda: 0.0)
                    case self.HOLDS:
                        hold(store, "why", clock=lambda: 0.0)
                        return self.RELEASES
                    case self.RELEASES:
                        release(store, clock=lambda: 0.0)
            except FedMoEError as error:
                return _told(error) or memory  # and the operator types it again
        return self.DONE


class Target(NamedTuple):
    """What an operator goes back to: a version, its weights and its server state (if any), as a replay gave them."""

    version: int
    lineage: str
    weights: bytes
    server_state: bytes | None = None


class OperatorGoingBack:
    """An operator who, once told to, rolls the expert back until it is done: IDLE, then a Target, then DONE."""

    IDLE, DONE = "idle", "has rolled the expert back"

    def __init__(self, spec: Spec, rules: Rules) -> None:
        self.name = "operator"
        self.first = self.IDLE
        self._spec = spec
        self._rules = rules

    def choices(self, memory: str | Target, db: Db) -> tuple[int, ...]:
        """Nothing but to go on with the rollback."""
        return (0,) if isinstance(memory, Target) else ()

    def fair_choice(self, memory: str | Target) -> int:
        return 0

    def check(self, memory: str | Target) -> str:
        """Only what it was told: an operator knows nothing that could be wrong."""
        return memory if isinstance(memory, str) and memory.startswith(WRONG) else ""

    def turn(self, memory: str | Target, replies: Sequence[Reply], choice: int) -> str | Target:
        """`fedmoe expert rollback`, whose parts are written once for two attempts; then it begins again.

        After a reconnect the real command begins again; this one gives up.
        """
        if not isinstance(memory, Target):
            return memory
        port = Port(replies)
        store = self._rules.expert_store(ModelConnection(Client(port)), NAME)
        state = VersionState(
            version=memory.version, lineage=memory.lineage, weights=memory.weights,
            server_state=memory.server_state, optimizer=NESTEROV if memory.server_state else "",
        )  # fmt: skip
        with replaced(self._rules, fedmoe.store.rollback, port):
            try:
                store.condition()
                rollback = prepare(self._spec, state, by="operator", generation=0)
                with parts_written(store, rollback) as ready:
                    try:
                        self._rules.roll_back(store, ready, clock=lambda: 0.0)
                    except StaleStateError:
                        if port.generation:
                            raise
                        self._rules.roll_back(store, ready, clock=lambda: 0.0)
            except Suspended as suspended:
                suspended.counts = True
                raise
            except StaleStateError:
                return self.DONE if port.generation else memory
            except FedMoEError as error:
                return _told(error) or self.DONE
        return self.DONE


def _told(error: FedMoEError) -> str:
    return f"{WRONG}: {error}" if told_damage(str(error)) else ""
