"""One step of one actor: it goes on with the replies it has, to its next request, which the database executes.

Every database, memory, request and list of replies is kept once, under a number, and what follows from it is computed
once.
"""

from collections.abc import Hashable
from typing import Any

from tests.protocol.actors import NEW_ID, Aggregator, Rules, Served, first_db, first_rules, make_spec
from tests.protocol.operators import Operator, OperatorGoingBack
from tests.protocol.state import (
    BROKEN,
    CLEAN,
    DIRTY,
    FAULTS,
    FREE,
    NO_REPLIES,
    SOUND,
    Label,
    Scope,
    Slot,
    State,
    Table,
)
from tests.protocol.worker import Worker
from tests.protocol.world import KEYS, Reply, Request, Suspended, execute

OF_COPIES = f"{KEYS.tail}:"
OPERATED = {"rules": ("rules", "hold"), "rollback": ("rollback",)}  # operator -> the faults that need one


class Steps:
    """The actors of a scope under some rules, and what each of their steps leads to."""

    def __init__(self, scope: Scope, rules: Rules | None = None) -> None:
        rules = rules or Rules()
        spec = make_spec(scope.workers, scope.units, scope.wire_format)
        self.scope = scope
        self._spec = spec
        self.aggregators = [Aggregator(f"aggregator {i}", spec, rules) for i in range(scope.aggregators)]
        self.workers = [
            Worker(
                "ab"[i], spec, rules, offset=i * scope.units, units=scope.units, disk=scope.disk,
                checkpoints=scope.checkpoints, notes_seen=bool(scope.faults.get("rollback")),
            )
            for i in range(scope.workers)
        ]  # fmt: skip
        operators: dict[str, Any] = {"rules": Operator(rules), "rollback": OperatorGoingBack(spec, rules)}
        found = [name for name, faults in OPERATED.items() if any(map(scope.faults.get, faults))]
        self.actors: list[Any] = [*self.aggregators, *self.workers, *(operators[name] for name in found)]
        self.operators = {name: self.actors.index(operators[name]) for name in found}
        self._dbs, self._memories, self._replies, self._requests = Table(), Table(), Table(), Table()
        assert self._replies(()) == NO_REPLIES
        self._single_replies = Table()
        self._longer: dict[tuple[int, int], int] = {}
        self._execs: dict[int, bool] = {}
        self._turns: dict[tuple[int, int, int, int], tuple[bool, int]] = {}
        self._suspended: dict[tuple[int, int, int, int], Suspended] = {}
        self._effects: dict[tuple[int, int], tuple[int, tuple[Any, ...], bool]] = {}

    def first(self) -> State:
        """A new expert; nobody has begun, but an aggregator that was paused."""
        slots = tuple(self._fresh(actor.first) for actor in self.actors)
        budget = tuple(self.scope.faults.get(name, 0) for name in FAULTS)
        rules = first_rules(self.scope.max_staleness, self.scope.max_norm, self.scope.momentum)
        state = State(self._dbs(first_db(self._spec, rules)), -1, 0, slots, (), budget)
        if self.scope.paused:
            state = self._do(self._whole_turn(state, 0, []), ("UNLINK", KEYS.lease))
        return state

    def _fresh(self, memory: Hashable, connection: int = SOUND) -> Slot:
        return Slot(self._memories(memory), NO_REPLIES, 0, connection, FREE)

    # ---- one actor's step

    def _turn(self, i: int, slot: Slot) -> tuple[bool, int]:
        """(True, request that comes next) or (False, memory after the turn)."""
        key = (i, slot.memory, slot.replies, slot.choice)
        if key not in self._turns:
            memory, replies = self._memories.values[slot.memory], self._replies.values[slot.replies]
            try:
                after = self.actors[i].turn(memory, replies, slot.choice)
                self._turns[key] = False, self._memories(after)
            except Suspended as suspended:
                self._turns[key] = True, self._requests(suspended.request)
                self._suspended[key] = suspended
        return self._turns[key]

    def _in_turn(self, i: int, slot: Slot) -> Suspended:
        """What is known of actor i as it waits for a reply."""
        self._turn(i, slot)
        return self._suspended[i, slot.memory, slot.replies, slot.choice]

    def _remembers(self, i: int, slot: Slot) -> bool:
        """True if aggregator i could write the expert back."""
        if slot.replies == NO_REPLIES:
            return self.aggregators[i].remembers(self._memories.values[slot.memory])
        return self._in_turn(i, slot).remembers

    def next_request(self, state: State, i: int) -> str:
        """What actor i asks for next, or nothing if it only goes on."""
        waits, number = self._turn(i, state.slots[i])
        return str(self._requests.values[number]) if waits else ""

    def _execute(self, db: int, request: int) -> tuple[int, tuple[Any, ...], bool]:
        """(db, replies, whether meta was touched)."""
        if (db, request) not in self._effects:
            commands = self._requests.values[request].commands
            after, replies = execute(self._dbs.values[db], commands)
            touched = any(c[:2] == ("HSET", KEYS.meta) or c[0] == "RELINEAGE" for c in commands)
            self._effects[db, request] = self._dbs(after), replies, touched
        return self._effects[db, request]

    def step(self, state: State, i: int, choice: int, fault: str = "") -> tuple[Label, State]:
        """Actor i executes its next request; `fault` is what goes wrong: lost, late or lag."""
        slot = state.slots[i]
        if slot.replies == NO_REPLIES:
            slot = Slot(slot.memory, NO_REPLIES, choice, slot.connection, slot.watch)
        waits, number = self._turn(i, slot)
        if not waits:
            return Label(i), self._done(state, i, number, slot.connection)
        request: Request = self._requests.values[number]
        keeps_watch = request.watched or request.commands[0][0] == "SCAN"  # which another connection asks
        connection, watch = slot.connection, slot.watch if keeps_watch else FREE
        is_exec = request.watched and self._is_exec(number)
        if watch and connection == BROKEN:
            reply, watch = Reply(error="watch"), FREE
        elif fault == "late":
            reply, connection = Reply(error="lost"), BROKEN
            state = state._replace(late=tuple(sorted((*state.late, (number, watch)))))
            watch = FREE
        elif is_exec and (watch == DIRTY or (watch and self._lacks_parts(state.db, number))):
            reply, watch = Reply(error="watch", reconnected=connection == BROKEN), FREE
        else:
            reconnected = connection == BROKEN
            state, values = self._write(state, number, lags=fault == "lag")
            connection = BROKEN if fault == "lost" else SOUND
            reply = Reply((), "lost", reconnected) if fault == "lost" else Reply(values, "", reconnected)
            if request.watched:
                begins = request.commands[0][0] == "WATCH" and watch != DIRTY
                watch = FREE if is_exec else CLEAN if begins else watch
        return Label(i, number, reply, fault), self._settle(state, i, slot, reply, connection, watch)

    def _lacks_parts(self, db: int, request: int) -> bool:
        """True if a part that this request watches has expired."""
        strings = dict(self._dbs.values[db].strings)
        return any(part not in strings for part in self._requests.values[request].parts)

    def _is_exec(self, number: int) -> bool:
        return self._execs.setdefault(number, self._requests.values[number].is_exec)

    def _write(self, state: State, request: int, *, lags: bool = False) -> tuple[State, tuple[Any, ...]]:
        """Execute a request; every WATCH on what it touched is broken."""
        db, values, touched = self._execute(state.db, request)
        _, replica, missed, slots, late, budget, owed = state
        if lags:
            replica, missed = state.db, 0
        if db != state.db and replica >= 0:
            missed += 1
        if touched:
            slots = tuple(s._replace(watch=DIRTY) if s.watch == CLEAN else s for s in slots)
            late = tuple(sorted((r, DIRTY if watch == CLEAN else watch) for r, watch in late))
        if owed and not self._gone(db):
            owed = ()
        return State(db, replica, missed, slots, late, budget, owed), values

    def _gone(self, db: int) -> bool:
        """True if a server holds no expert."""
        return db >= 0 and self._dbs.values[db].gone

    def _may_vanish(self, state: State) -> bool:
        """True if the expert is gone, or may be in a state that comes."""
        return bool(state.budget[FAULTS.index("empty")] or self._gone(state.db) or self._gone(state.replica))

    def _may_lose(self, state: State, memory: Served, connection: int) -> bool:
        """True if the server lost what an aggregator remembers, or may lose it."""
        if self._may_vanish(state) or state.replica >= 0 or state.budget[FAULTS.index("failover")]:
            return True
        present = self._dbs.values[state.db].hash(KEYS.meta)["commit"]
        return connection == BROKEN or bool(memory.meta and memory.meta.commit != present)

    def _done(self, state: State, i: int, memory: int, connection: int) -> State:
        """Actor i is at the end of its turn."""
        if i < len(self.aggregators):
            served: Served = self._memories.values[memory]
            if not self._may_lose(state, served, connection):
                memory = self._memories(self.aggregators[i].without_use(served))
        return with_slot(state, i, Slot(memory, NO_REPLIES, 0, connection, FREE))

    def _settle(self, state: State, i: int, slot: Slot, reply: Reply, connection: int, watch: int) -> State:
        """Give an actor its reply, and take those of its steps that nobody else can tell from this one."""
        memory, replies, choice, _, _ = slot
        if reply.reconnected and not self._in_turn(i, slot).counts:
            reply = reply._replace(reconnected=False)
        while True:
            replies = self._answered(replies, reply)
            slot = Slot(memory, replies, choice, connection, watch)
            waits, number = self._turn(i, slot)
            if not waits:
                return self._done(state, i, number, connection)
            request = self._requests.values[number]
            if request == NEW_ID:
                reply = Reply((self._new_id(with_slot(state, i, slot)),))
            elif request.commands == (("GET", KEYS.spec),) and not self._gone(state.db):  # it never changes
                reply = Reply((self._dbs.values[state.db].string(KEYS.spec),))
            elif (
                request.commands[0][0] == "GROUP"
                and self._dbs.values[state.db].delivered is not None
                and not self._may_vanish(state)
            ):
                reply = Reply((False,))
            elif connection == SOUND and self._is_unseen(state, request):
                reply = Reply(self._execute(state.db, number)[1])
            else:
                return with_slot(state, i, slot)

    def _is_unseen(self, state: State, request: Request) -> bool:
        """True if a request reads what nobody changes, but with a commit that ends in failure what the reader does."""
        name, key, *_ = request.commands[0]
        if not request.watched and (name, key[: len(OF_COPIES)]) != ("GETRANGE", OF_COPIES):
            return False
        if request.commands == (("HGETALL", KEYS.tail),):
            return True
        may_expire = state.budget[FAULTS.index("orphans")] or state.budget[FAULTS.index("failover")]
        return key.startswith(OF_COPIES) and not (may_expire or state.replica >= 0 or self._may_vanish(state))

    def _answered(self, replies: int, reply: Reply) -> int:
        key = replies, self._single_replies(reply)
        if key not in self._longer:
            self._longer[key] = self._replies((*self._replies.values[replies], reply))
        return self._longer[key]

    def _new_id(self, state: State) -> str:
        """The first id that occurs nowhere: as good as a random one, and the states stay few."""
        used = set(self._dbs.ids(state.db)) | (self._dbs.ids(state.replica) if state.replica >= 0 else set())
        for slot in state.slots:
            used |= self._memories.ids(slot.memory) | self._replies.ids(slot.replies)
        for request, _ in state.late:
            used |= self._requests.ids(request)
        return next(f"c{n}" for n in range(len(used) + 1) if f"c{n}" not in used)

    def _do(self, state: State, command: tuple[Any, ...]) -> State:
        return self._write(state, self._requests(Request((command,))))[0]

    def _whole_turn(self, state: State, i: int, labels: list[Label]) -> State:
        choice = self.actors[i].fair_choice(self._memories.values[state.slots[i].memory])
        state = self._logged(labels, *self.step(state, i, choice))
        while state.slots[i].replies != NO_REPLIES:
            state = self._logged(labels, *self.step(state, i, choice))
        return state

    def _logged(self, labels: list[Label], label: Label, state: State) -> State:
        labels.append(label)
        return state


def with_slot(state: State, i: int, slot: Slot) -> State:
    return state._replace(slots=(*state.slots[:i], slot, *state.slots[i + 1 :]))


def without(state: State, entry: tuple[int, int]) -> State:
    rest = list(state.late)
    rest.remove(entry)
    return state._replace(late=tuple(rest))
