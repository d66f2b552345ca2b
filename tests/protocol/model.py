"""Every state that a federation can come to, one step at a time, and what must hold in it.

Each Redis command or transaction of an actor is one step. In every state the invariants must hold, and a run from
there without further faults must come to rest with nothing lost. States are tuples of small numbers: every database,
memory, request and list of replies is kept once, and what follows from it is computed once.
"""

from collections.abc import Hashable, Iterator
from typing import Any

from tests.protocol.actors import (
    NEW_ID,
    Aggregator,
    Operator,
    Rules,
    Served,
    first_db,
    first_file,
    first_rules,
    make_spec,
)
from tests.protocol.checks import check_db, weights_of
from tests.protocol.state import (
    BROKEN,
    CLEAN,
    DIRTY,
    ENDLESS,
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
from tests.protocol.world import KEYS, Db, Reply, Request, Suspended, execute


class Model:
    """All states of a scope under some rules."""

    def __init__(self, scope: Scope, rules: Rules | None = None) -> None:
        rules = rules or Rules()
        spec = make_spec(scope.workers, scope.units)
        self.scope = scope
        self._spec = spec
        self.aggregators = [Aggregator(f"aggregator {i}", spec, rules) for i in range(scope.aggregators)]
        self.workers = [
            Worker(
                "ab"[i], spec, rules, offset=i * scope.units, units=scope.units, disk=scope.disk,
                checkpoints=scope.checkpoints,
            )
            for i in range(scope.workers)
        ]  # fmt: skip
        operators = [Operator(rules)] if scope.faults.get("rules") else []
        self.actors: list[Any] = [*self.aggregators, *self.workers, *operators]
        self._dbs, self._memories, self._replies, self._requests = Table(), Table(), Table(), Table()
        assert self._replies(()) == NO_REPLIES
        self._single_replies = Table()
        self._longer: dict[tuple[int, int], int] = {}
        self._execs: dict[int, bool] = {}
        self._turns: dict[tuple[int, int, int, int], tuple[bool, int]] = {}
        self._suspended: dict[tuple[int, int, int, int], Suspended] = {}
        self._effects: dict[tuple[int, int], tuple[int, tuple[Any, ...], bool]] = {}
        self._db_checks: dict[int, str] = {}
        self._memory_checks: dict[tuple[int, int], str] = {}
        self._calm: set[tuple[State, int]] = set()

    def first(self) -> State:
        """A new expert; nobody has begun, but an aggregator that was paused."""
        slots = tuple(self._fresh(actor.first) for actor in self.actors)
        budget = tuple(self.scope.faults.get(name, 0) for name in FAULTS)
        rules = first_rules(self.scope.max_staleness, self.scope.max_norm)
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
        connection, watch = slot.connection, slot.watch if request.watched else FREE
        is_exec = request.watched and self._is_exec(number)
        if watch and connection == BROKEN:
            reply, watch = Reply(error="watch"), FREE
        elif fault == "late":
            reply, connection = Reply(error="lost"), BROKEN
            state = state._replace(late=tuple(sorted((*state.late, (number, watch)))))
            watch = FREE
        elif is_exec and watch == DIRTY:
            reply, watch = Reply(error="watch", reconnected=connection == BROKEN), FREE
        else:
            reconnected = connection == BROKEN
            state, values = self._write(state, number, lags=fault == "lag")
            connection = BROKEN if fault == "lost" else SOUND
            reply = Reply((), "lost", reconnected) if fault == "lost" else Reply(values, "", reconnected)
            if request.watched:
                watch = FREE if is_exec else CLEAN if request.commands[0][0] == "WATCH" else watch
        return Label(i, number, reply, fault), self._settle(state, i, slot, reply, connection, watch)

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
        return _with(state, i, Slot(memory, NO_REPLIES, 0, connection, FREE))

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
                reply = Reply((self._new_id(_with(state, i, slot)),))
            elif request.commands == (("GET", KEYS.spec),) and not self._gone(state.db):  # it never changes
                reply = Reply((self._dbs.values[state.db].string(KEYS.spec),))
            elif (
                request.commands[0][0] == "GROUP"
                and self._dbs.values[state.db].delivered is not None
                and not self._may_vanish(state)
            ):
                reply = Reply((False,))
            else:
                return _with(state, i, slot)

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

    def words(self, label: Label) -> str:
        """A label as a line of a trace."""
        name = self.actors[label.actor].name if label.actor >= 0 else ""
        if label.request < 0:
            return f"{name}: {label.what or 'goes on'}" if name else label.what
        request = self._requests.values[label.request]
        if not name:
            return f"{label.what}: {request}"
        text = f"{name}: {request}"
        if label.reply.error == "watch":
            return text + " -> nothing: meta was touched, or the connection was cut"
        if label.what == "late":
            return text + " -> sent, no reply, the client gives up"
        if label.what == "lost":
            return text + " -> executed, the reply is lost"
        text += f" -> {_short(label.reply.values)}" if _short(label.reply.values) else ""
        text += " (over a connection opened again)" if label.reply.reconnected else ""
        return text + (" (from here on nothing reaches the replica)" if label.what == "lag" else "")

    # ---- everything that may happen

    def successors(self, state: State) -> Iterator[tuple[Label, State]]:
        """Every step and every fault that the budget allows."""
        db: Db = self._dbs.values[state.db]
        for i, actor in enumerate(self.actors):
            slot = state.slots[i]
            memory = self._memories.values[slot.memory]
            begins = slot.replies == NO_REPLIES
            for choice in actor.choices(memory, db) if begins else (slot.choice,):
                yield from self._steps(state, i, choice)
            if isinstance(actor, Operator):
                continue
            fault = "kill_aggregator" if i < len(self.aggregators) else "kill_worker"
            if (spent := self.spend(state, fault)) and (memory != actor.first or not begins):
                owed = tuple(debtor for debtor in state.owed if debtor != i)
                yield (
                    Label(i, what="killed"),
                    _with(spent, i, self._fresh(actor.crashed(memory)))._replace(owed=owed),
                )
        for entry in dict.fromkeys(state.late):
            yield Label(request=entry[0], what="arrives late"), self._arrive(state, entry)
            yield Label(request=entry[0], what="never arrives"), _without(state, entry)
        for i, worker in enumerate(self.workers, len(self.aggregators)):
            slot = state.slots[i]
            left = worker.left(self._memories.values[slot.memory])
            # One that leaves an update in Redis trusts this server: nothing may come that it has not seen.
            trusts = (
                state.replica < 0
                and not any(state.budget[FAULTS.index(fault)] for fault in ("failover", "empty"))
                and slot.connection == SOUND
            )
            if left and trusts and slot.replies == NO_REPLIES and (spent := self.spend(state, "leave")):
                yield Label(i, what="leaves"), _with(spent, i, self._fresh(left))
        yield from self._disasters(state, db)

    def _steps(self, state: State, i: int, choice: int) -> Iterator[tuple[Label, State]]:
        plain = self.step(state, i, choice)
        if self._dbs.values[plain[1].db].last_id > self.scope.entries:
            return
        if state.replica < 0 or plain[1].missed <= self.scope.lag:
            yield plain
        slot = state.slots[i]
        waits, number = self._turn(i, slot._replace(choice=choice))
        if not waits:
            return
        request: Request = self._requests.values[number]
        is_read = request.commands[0][0] == "XREADGROUP"
        writes = request.is_exec or request.rings or is_read
        if writes and (spent := self.spend(state, "lost")):
            yield self.step(spent, i, choice, "lost")
        if writes and not is_read and slot.connection == SOUND and (spent := self.spend(state, "late")):
            yield self.step(spent, i, choice, "late")
        if state.replica < 0 and plain[1].db != state.db and (spent := self.spend(state, "failover")):
            yield self.step(spent, i, choice, "lag")

    def spend(self, state: State, fault: str) -> State | None:
        """The state with one fault less in its budget, None if there is none left."""
        n = FAULTS.index(fault)
        if not state.budget[n]:
            return None
        return state._replace(budget=(*state.budget[:n], state.budget[n] - 1, *state.budget[n + 1 :]))

    def _arrive(self, state: State, entry: tuple[int, int]) -> State:
        state = _without(state, entry)
        return state if entry[1] == DIRTY else self._write(state, entry[0])[0]

    def _disasters(self, state: State, db: Db) -> Iterator[tuple[Label, State]]:
        if state.replica >= 0:
            replica: Db = self._dbs.values[state.replica]
            written = tuple(sorted(dict(replica.written + db.written).items()))
            yield (
                Label(what="the replica takes over"),
                self._restarted(state._replace(replica=-1, missed=0), replica._replace(written=written)),
            )
        elif spent := self.spend(state, "empty"):
            yield Label(what="the server restarts with nothing"), self._restarted(spent, db.emptied())
        if db.string(KEYS.lease) and (spent := self.spend(state, "lease")):
            yield Label(what="the lease expires"), self._do(spent, ("UNLINK", KEYS.lease))
        if db.hash(KEYS.claims):
            yield Label(what="all claims are forgotten"), self._do(state, ("UNLINK", KEYS.claims))
        if spent := self.spend(state, "expire"):
            for key, _ in db.strings:
                if ":payload:" in key and not key.endswith(":incarnation"):
                    yield Label(what=f"{key} expires"), self._do(spent, ("UNLINK", key))
        if db.stream and (spent := self.spend(state, "trim")):
            yield Label(what="somebody empties the stream"), self._do(spent, ("XTRIM", KEYS.updates))
        if not db.gone and (spent := self.spend(state, "new_lineage")):
            zeros = first_file(self._spec)
            yield Label(what="an operator begins a new lineage"), self._do(spent, ("RELINEAGE", zeros))
        if spent := self.spend(state, "rules"):
            operator = len(self.actors) - 1
            yield (
                Label(operator, what=Operator.WANTS),
                _with(spent, operator, self._fresh(Operator.WANTS, state.slots[operator].connection)),
            )
        if spent := self.spend(state, "forge"):
            for fields in [(), *(_forged(key) for key, _ in db.written if key.endswith(":0"))]:
                yield (
                    Label(what=f"somebody writes an entry {dict(fields)}"),
                    self._do(spent, ("XADD", KEYS.updates, fields)),
                )

    def _restarted(self, state: State, db: Db) -> State:
        """Another server, or the same without its memory: all connections are broken, what was on its way is gone."""
        owed = (
            [i for i in range(len(self.aggregators)) if self._remembers(i, state.slots[i])] if db.gone else []
        )
        slots = tuple(slot._replace(connection=BROKEN) for slot in state.slots)
        return state._replace(db=self._dbs(db), slots=slots, late=(), owed=tuple(owed))

    def _do(self, state: State, command: tuple[Any, ...]) -> State:
        return self._write(state, self._requests(Request((command,))))[0]

    # ---- what must hold

    def check(self, state: State) -> str:
        """What is wrong with a state, or nothing."""
        if state.db not in self._db_checks:
            self._db_checks[state.db] = check_db(
                self._dbs.values[state.db], self._spec, refuses_nothing=self.scope.refuses_nothing
            )
        if wrong := self._db_checks[state.db]:
            return wrong
        for i, slot in enumerate(state.slots):
            key = (i, slot.memory)
            if key not in self._memory_checks:
                self._memory_checks[key] = self.actors[i].check(self._memories.values[slot.memory])
            if wrong := self._memory_checks[key]:
                return wrong
        return ""

    def check_end(self, state: State) -> tuple[str, list[Label]]:
        """Run fairly from here without faults, with all actors and with only the last; what is wrong at rest."""
        for alone in range(min(2, len(self.aggregators))):
            labels: list[Label] = []
            seen: dict[State, None] = {}
            now = state
            while (now, alone) not in self._calm:
                seen[now] = None
                after = self._fair(now, alone, labels)
                wrong = self.check(after) or (self._check_rest(after, alone) if after == now else "")
                if after != now and (after in seen or len(seen) > ENDLESS):
                    wrong = "it goes round for ever"
                if wrong:
                    return wrong, labels
                if after == now:
                    break
                now = after
            self._calm.update((one, alone) for one in seen)
        return "", []

    def _fair(self, state: State, alone: int, labels: list[Label]) -> State:
        """One step of an actor in the middle of its turn; if none is, a turn of each and what is on its way.

        It depends on the state alone, so runs from different states soon become one. With `alone` the first
        aggregator sleeps for ever.
        """
        living, before = range(alone, len(self.actors)), state
        for i in living:
            if state.slots[i].replies != NO_REPLIES:
                return self._logged(labels, *self.step(state, i, 0))
        if alone and self._dbs.values[state.db].string(KEYS.lease) == self.aggregators[0].name.encode():
            return self._logged(
                labels, Label(what="the lease expires"), self._do(state, ("UNLINK", KEYS.lease))
            )
        for i in living:
            state = self._whole_turn(state, i, labels)
        for entry in state.late:
            label = Label(request=entry[0], what="arrives late")
            state = self._logged(labels, label, self._arrive(state, entry))
        if state == before and self._dbs.values[state.db].hash(KEYS.claims):
            return self._logged(
                labels, Label(what="all claims are forgotten"), self._do(state, ("UNLINK", KEYS.claims))
            )
        return state

    def _whole_turn(self, state: State, i: int, labels: list[Label]) -> State:
        choice = self.actors[i].fair_choice(self._memories.values[state.slots[i].memory])
        state = self._logged(labels, *self.step(state, i, choice))
        while state.slots[i].replies != NO_REPLIES:
            state = self._logged(labels, *self.step(state, i, choice))
        return state

    def _logged(self, labels: list[Label], label: Label, state: State) -> State:
        labels.append(label)
        return state

    def _check_rest(self, state: State, alone: int) -> str:
        db: Db = self._dbs.values[state.db]
        if db.gone:  # all wait for an operator, unless somebody could do without
            owed = [i for i in state.owed if i >= alone]
            return f"the expert is gone although {self.actors[owed[0]].name} remembered it" if owed else ""
        if db.stream or db.pending:
            return f"entries stay for ever: stream {[i for i, _ in db.stream]}, pending {list(db.pending)}"
        weights = weights_of(db, self._spec)
        for worker, slot in zip(self.workers, state.slots[len(self.aggregators) :], strict=False):
            if wrong := worker.check_rest(self._memories.values[slot.memory], weights):
                return wrong
        return ""


def _with(state: State, i: int, slot: Slot) -> State:
    return state._replace(slots=(*state.slots[:i], slot, *state.slots[i + 1 :]))


def _without(state: State, entry: tuple[int, int]) -> State:
    rest = list(state.late)
    rest.remove(entry)
    return state._replace(late=tuple(rest))


def _short(values: tuple[Any, ...]) -> str:
    texts = [str(v) for v in values if isinstance(v, bool | str | int)]
    texts += [
        f"entries {[i for i, _ in v]}"
        for v in values
        if isinstance(v, tuple) and v and isinstance(v[0], tuple) and isinstance(v[0][1], tuple)
    ]
    return ", ".join(text for text in texts if len(text) < 60)


def _forged(key: str) -> tuple[tuple[str, str], ...]:
    worker, run, seq = key.split(":")[-4:-1]
    return (("run", run), ("seq", seq), ("worker", worker))
