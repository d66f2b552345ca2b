"""Every state that a federation can come to, one step at a time, and what must hold in it.

Each Redis command or transaction of an actor is one step. In every state the invariants must hold, and a run from
there without further faults must come to rest with nothing lost. States are tuples of small numbers: every database,
memory, request and list of replies is kept once, and what follows from it is computed once.
"""

from collections.abc import Iterator
from typing import Any

import torch

from tests.protocol.actors import Rules, Values, first_file
from tests.protocol.checks import check_bases, check_db, check_vectors, taken_back, versions_of, weights_of
from tests.protocol.operators import Operator, Target
from tests.protocol.state import (
    BROKEN,
    DIRTY,
    ENDLESS,
    FAULTS,
    NO_REPLIES,
    SOUND,
    Label,
    Scope,
    Slot,
    State,
)
from tests.protocol.steps import Steps, with_slot, without
from tests.protocol.world import KEYS, OVERWRITTEN, Db, Request

_NO_PART = (":incarnation", ":header")  # of an update


class Model(Steps):
    """All states of a scope under some rules."""

    def __init__(self, scope: Scope, rules: Rules | None = None) -> None:
        super().__init__(scope, rules)
        self._db_checks: dict[int, str] = {}
        self._memory_checks: dict[tuple[int, int], str] = {}
        self._bases_checks: dict[tuple[int, tuple[int, ...]], str] = {}
        self._calm: set[tuple[State, int]] = set()

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
            if i in self.operators.values():
                continue
            fault = "kill_aggregator" if i < len(self.aggregators) else "kill_worker"
            if (spent := self.spend(state, fault)) and (memory != actor.first or not begins):
                owed = tuple(debtor for debtor in state.owed if debtor != i)
                yield (
                    Label(i, what="killed"),
                    with_slot(spent, i, self._fresh(actor.crashed(memory)))._replace(owed=owed),
                )
        for entry in dict.fromkeys(state.late):
            yield Label(request=entry[0], what="arrives late"), self._arrive(state, entry)
            yield Label(request=entry[0], what="never arrives"), without(state, entry)
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
                yield Label(i, what="leaves"), with_slot(spent, i, self._fresh(left))
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
        writes = request.is_exec or request.rings or request.copies or is_read
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
        state = without(state, entry)
        is_off = entry[1] == DIRTY or (entry[1] and self._lacks_parts(state.db, entry[0]))
        return state if is_off else self._write(state, entry[0])[0]

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
        for fault, command, what in (
            ("expire", "UNLINK", "expires"),
            ("spoil", "SPOIL", "is written over by its worker"),
        ):
            if spent := self.spend(state, fault):
                for key, _ in db.strings:
                    if ":payload:" in key and not key.endswith(
                        ":incarnation" if fault == "expire" else _NO_PART
                    ):
                        yield Label(what=f"{key} {what}"), self._do(spent, (command, key))
        if db.string(KEYS.packed) and (spent := self.spend(state, "unpack")):
            yield Label(what="somebody removes the packed weights"), self._do(spent, ("UNLINK", KEYS.packed))
        if db.volatile and (spent := self.spend(state, "orphans")):
            after = self._dbs(db.without_volatile())
            yield Label(what="what no commit has made permanent expires"), spent._replace(db=after)
        if db.stream and (spent := self.spend(state, "trim")):
            yield Label(what="somebody empties the stream"), self._do(spent, ("XTRIM", KEYS.updates))
        if not db.gone and (spent := self.spend(state, "new_lineage")):
            zeros = first_file(self._spec)
            yield Label(what="an operator begins a new lineage"), self._do(spent, ("RELINEAGE", zeros))
        for fault, wish in (("rules", Operator.WANTS), ("hold", Operator.HOLDS)):
            operator = self.operators.get("rules", -1)
            is_idle = operator >= 0 and (
                self._memories.values[state.slots[operator].memory] in (Operator.IDLE, Operator.DONE)
            )
            if is_idle and (spent := self.spend(state, fault)):
                slot = self._fresh(wish, state.slots[operator].connection)
                yield Label(operator, what=wish), with_slot(spent, operator, slot)
        if not db.gone and db.base != OVERWRITTEN and (spent := self.spend(state, "rollback")):
            operator = self.operators["rollback"]
            *earlier, _ = versions_of(db, self._spec).items()
            for version, at in earlier:
                files = [None if one is None else self._file(one) for one in (at.weights, at.state)]
                target = Target(version, db.hash(KEYS.meta)["lineage"], *files)
                yield (
                    Label(operator, what=f"wants to roll back to version {version}"),
                    with_slot(spent, operator, self._fresh(target)),
                )
        if spent := self.spend(state, "forge"):
            for fields in [(), *(_forged(key) for key, _ in db.written if key.endswith(":0"))]:
                yield (
                    Label(what=f"somebody writes an entry {dict(fields)}"),
                    self._do(spent, ("XADD", KEYS.updates, fields)),
                )

    def _file(self, values: Values) -> bytes:
        return bytes(self._spec.layout.header + torch.tensor(values).numpy().tobytes())

    def _restarted(self, state: State, db: Db) -> State:
        """Another server, or the same without its memory: all connections are broken, what was on its way is gone."""
        owed = (
            [i for i in range(len(self.aggregators)) if self._remembers(i, state.slots[i])] if db.gone else []
        )
        slots = tuple(slot._replace(connection=BROKEN) for slot in state.slots)
        return state._replace(db=self._dbs(db), slots=slots, late=(), owed=tuple(owed))

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
        return self._check_bases(state) if self.scope.faults.get("rollback") else ""

    def _check_bases(self, state: State) -> str:
        memories = tuple(slot.memory for slot in self._worker_slots(state))
        key = (state.db, memories)
        if key not in self._bases_checks:
            db: Db = self._dbs.values[state.db]
            seen = {
                worker.name: dict(self._memories.values[memory].seen)
                for worker, memory in zip(self.workers, memories, strict=True)
            }
            self._bases_checks[key] = "" if db.gone else check_bases(db, self._spec, seen)
        return self._bases_checks[key]

    def _worker_slots(self, state: State) -> tuple[Slot, ...]:
        first = len(self.aggregators)
        return state.slots[first : first + len(self.workers)]

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

    def _check_rest(self, state: State, alone: int) -> str:
        db: Db = self._dbs.values[state.db]
        if db.gone:  # all wait for an operator, unless somebody could do without
            owed = [i for i in state.owed if i >= alone]
            return f"the expert is gone although {self.actors[owed[0]].name} remembered it" if owed else ""
        if db.stream or db.pending:
            return f"entries stay for ever: stream {[i for i, _ in db.stream]}, pending {list(db.pending)}"
        weights, gone = weights_of(db, self._spec), taken_back(db, self._spec)
        for worker, slot in zip(self.workers, self._worker_slots(state), strict=True):
            if wrong := worker.check_rest(self._memories.values[slot.memory], weights, gone):
                return wrong
        return check_vectors(db)


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
