"""The rules about the copies of the tail's parts, taken out one by one, as in `broken`."""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import fedmoe.store.expert
import fedmoe.store.lifecycle
import fedmoe.store.worker
from fedmoe.protocol.growth import Growth
from fedmoe.protocol.keys import ExpertKeys
from fedmoe.protocol.tail import Copy
from fedmoe.protocol.update import Part
from fedmoe.store.commit import Commit
from fedmoe.store.copies import readings
from fedmoe.store.expert import ExpertStore
from fedmoe.store.parts import NewWeights, stray_parts
from tests.protocol.actors import Rules
from tests.protocol.broken import Broken
from tests.protocol.broken_parts import makes_nothing_permanent, removed_after_any_error
from tests.protocol.client import Pipeline
from tests.protocol.scopes import TAIL
from tests.protocol.state import Scope
from tests.protocol.world import KEYS


class FoldsWhatTheWorkerHolds(ExpertStore):
    """Parts are copied, and then the worker's own are read once more, checked and folded."""

    def parts(
        self, worker: str, run: str, seq: int, parts: Sequence[Part], copy: Copy | None = None
    ) -> Generator[bytes, None, None]:
        for _ in super().parts(worker, run, seq, parts, copy):
            pass
        yield from super().parts(worker, run, seq, parts)


class NamesTheWorkersKeys(ExpertStore):
    """The tail names the parts where the worker has written them; the commit has them stay."""

    def parts(
        self, worker: str, run: str, seq: int, parts: Sequence[Part], copy: Copy | None = None
    ) -> Generator[bytes, None, None]:
        yield from super().parts(worker, run, seq, parts)
        if copy is not None:
            copy.token, copy.n_made = f"{worker}:{run}:{seq}", copy.count

    def commit(self, commit: Commit) -> None:
        commit.unlink = [key for key in commit.unlink if key not in commit.copies]
        super().commit(commit)


def workers_key(_: object, update: str, index: int | str) -> str:
    """The worker's own key, for `NamesTheWorkersKeys`; no pattern of them."""
    return f"{KEYS.root}:payload:{update}:{index}" if update != "*" else "none"


def one_token(growth: Growth, _: str, n_parts: int) -> Copy | None:
    """Every aggregator gives the copies of an update the same name."""
    return _copy(growth, "c90", n_parts)


_copy = Growth.copy


def looks_at_nothing(*_: object) -> None:
    """A commit WATCHes its copies, and does not ask whether they are still there."""


def watches_no_copies(pipe: Pipeline, *keys: str) -> None:
    """A commit asks whether its copies are there, and does not WATCH them."""
    _watch(pipe, *(key for key in keys if not key.startswith(f"{KEYS.tail}:")))


_watch = Pipeline.watch


def removes_all_copies(new: NewWeights) -> None:
    """An aggregator whose commit came too late removes whatever copies are there."""
    for key in new._client.scan_iter(match=f"{KEYS.tail}:*:*", count=1000):
        new._client.unlink(key.decode())


def names_no_copies(*_: object) -> list[str]:
    """Whatever writes the weights leaves the copies of the tail."""
    return []


def strays_but_copies(client: Any, keys: Any, **but: Any) -> Iterator[bytes]:
    """An expert that is written back leaves the copies of the tail before."""
    return (key for key in stray_parts(client, keys, **but) if not key.startswith(f"{KEYS.tail}:".encode()))


def read_once(*reads: Any, **how: Any) -> Iterator[Any]:
    """A reader calls the expert damaged if a copy is gone, and does not read meta again."""
    yield next(iter(readings(*reads, **how)))


def reading_once(*where: Any) -> Rules:
    """The rules in which these modules do not begin again."""
    return Rules(patches=tuple((module, "readings", read_once) for module in where))


BROKEN_COPIES = {
    "H30_folded_from_the_workers_key": Broken(
        what="an aggregator copies a part, and then folds what its worker holds",
        rules=Rules(expert_store=FoldsWhatTheWorkerHolds),
        scope=Scope(wire_format=TAIL, units=1, faults={"spoil": 2}),
        symptom="the expert is damaged: in its tail, the update of version 1 is damaged",
    ),
    "H30_tail_of_the_workers_keys": Broken(
        what="the tail names the keys of the worker",
        rules=Rules(
            expert_store=NamesTheWorkersKeys,
            throughout=((ExpertKeys, "tail_part", workers_key),),
        ),
        scope=Scope(wire_format=TAIL, units=1, faults={"spoil": 1}),
        symptom="the expert is damaged: in its tail, the update of version 1 is damaged",
    ),
    "H30_nothing_is_permanent": Broken(
        what="copies expire after the commit that names them",
        rules=Rules(patches=((NewWeights, "queue", makes_nothing_permanent),)),
        scope=Scope(wire_format=TAIL, units=1),
        symptom="is in use and expires",
    ),
    "H30_no_look_at_what_is_watched": Broken(
        what="copies expire before the commit WATCHes them",
        rules=Rules(patches=((NewWeights, "check", looks_at_nothing),)),
        scope=Scope(wire_format=TAIL, units=1, faults={"orphans": 1}),
        symptom="the expert is damaged: its tail lacks part 0",
    ),
    "H30_looked_at_and_not_watched": Broken(
        what="copies expire between the look at them and the commit",
        rules=Rules(patches=((Pipeline, "watch", watches_no_copies),)),
        scope=Scope(wire_format=TAIL, units=1, faults={"orphans": 1}),
        symptom="the expert is damaged: its tail lacks part 0",
    ),
    "H30_token_of_the_update": Broken(
        what="two aggregators give the copies of an update the same name",
        rules=Rules(patches=((Growth, "copy", one_token),)),
        scope=Scope(wire_format=TAIL, aggregators=2, units=1, faults={"lease": 1}),
        symptom="the expert is damaged: its tail lacks part 0",
    ),
    "H30_removed_after_a_lost_reply": Broken(
        what="copies are removed after a commit that may have been executed",
        rules=Rules(patches=((NewWeights, "__exit__", removed_after_any_error),)),
        scope=Scope(wire_format=TAIL, units=1, faults={"lost": 1}),
        symptom="the expert is damaged: its tail lacks part 0",
    ),
    "H30_those_of_others_removed": Broken(
        what="an aggregator whose commit came too late removes the copies of others, too",
        rules=Rules(patches=((NewWeights, "_remove", removes_all_copies),)),
        scope=Scope(wire_format=TAIL, aggregators=2, units=1, faults={"lease": 1}),
        symptom="the expert is damaged: its tail lacks part 0",
    ),
    "H30_copies_stay": Broken(
        what="whatever writes the weights leaves the copies of the tail",
        rules=Rules(patches=((fedmoe.store.expert, "copied_keys", names_no_copies),)),
        scope=Scope(wire_format=TAIL, units=1),
        symptom="is of no use and stays for ever",
    ),
    "H30_copies_stay_when_written_back": Broken(
        what="an expert that is written back leaves the copies of the tail before",
        rules=Rules(patches=((fedmoe.store.lifecycle, "stray_parts", strays_but_copies),)),
        scope=Scope(wire_format=TAIL, units=1, lag=2, faults={"failover": 1}),
        symptom="is of no use and stays for ever",
    ),
    "H30_load_does_not_begin_again": Broken(
        what="an aggregator loads: it calls the expert damaged if a copy is gone",
        rules=reading_once(fedmoe.store.expert),
        scope=Scope(wire_format=TAIL, aggregators=2, units=1, faults={"lease": 1}),
        symptom="finds damage where none is",
    ),
    "H30_rescue_does_not_begin_again": Broken(
        what="an aggregator checks if Redis lost the expert, a copy is gone, and it calls the expert damaged",
        rules=reading_once(fedmoe.store.lifecycle),
        scope=Scope(wire_format=TAIL, aggregators=2, units=1, paused=True),
        symptom="aggregator 0 finds damage where none is",
    ),
    "H30_operator_does_not_begin_again": Broken(
        what="an operator changes the rules: the command calls the expert damaged if a copy is gone",
        rules=reading_once(fedmoe.store.lifecycle),
        scope=Scope(wire_format=TAIL, units=1, faults={"rules": 1}),
        symptom="operator finds damage where none is",
    ),
    "H30_worker_does_not_begin_again": Broken(
        what="a worker needs the exact weights: it calls the expert damaged if a copy is gone",
        rules=reading_once(fedmoe.store.worker),
        scope=Scope(wire_format=TAIL, units=1, faults={"unpack": 1}),
        symptom="finds damage where none is",
    ),
}
