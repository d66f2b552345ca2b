"""The rules about a server that lost something, taken out one by one, as in `broken`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import consumers.recovery.settle
import producers.ledger
from consumers.aggregator import ExpertServer
from consumers.expert import Expert
from consumers.history import History
from consumers.recovery.write_back import write_back
from fedmoe.errors import LostExpertError, RefusedError
from fedmoe.protocol.condition import Condition
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.records import NO_DECISIONS, PROTOCOL, Entry, Meta
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Header, UpdateId
from fedmoe.store.expert import ExpertStore
from fedmoe.store.parts import NewWeights
from fedmoe.store.worker import Poll, WorkerStore
from producers.ledger import HeadPlace, locate
from tests.protocol.actors import Rules, make_spec
from tests.protocol.broken import Broken
from tests.protocol.state import Scope


class ForgetsAtErrors(ExpertServer):
    """An aggregator's memory is thrown away without a look whether the server has still what it is a copy of."""

    def rescue(self, expert: Expert) -> None:
        self.retained = None


class RescuesWithTheLease(ExpertServer):
    """Who has not the lease writes nothing back."""

    def rescue(self, expert: Expert) -> None:
        if self.lease.hold():
            super().rescue(expert)


class Overwrites(ExpertStore):
    """What an aggregator retains is written whatever is there by now."""

    def write_back(self, spec: Spec, meta: Meta, weights: memoryview, **more: Any) -> bool:
        pipe = self._redis.pipeline(transaction=True)
        new = NewWeights(self._redis, self.keys, meta.parts, weights, None)
        self._queue_parts(pipe, spec, meta, new, None)
        if more["decided"]:
            pipe.hset(self.keys.decided, mapping={w: d.to_json() for w, d in more["decided"].items()})
        for line in more["log"]:
            pipe.xadd(self.keys.log, line)
        with self.connection.errors():
            pipe.execute()
        return True


class BeginsAnew(ExpertServer):
    """An aggregator that finds no expert makes one."""

    def _load(self) -> list[Entry]:
        try:
            return super()._load()
        except LostExpertError:
            spec = make_spec(workers=1, units=1)
            buffer = AdapterBuffer(spec.layout)
            meta = Meta(
                lineage="another", commit="c98", weights_commit="c98", spec=spec.digest, protocol=PROTOCOL
            )
            self.store.create(spec, meta, buffer.file)
            raise


class GivesUp(WorkerStore):
    """A worker whose expert is gone ends."""

    def poll(self, entry_id: str, header: Header) -> Poll:
        try:
            return super().poll(entry_id, header)
        except LostExpertError as error:
            raise RefusedError(str(error), about=error.about) from error


class ForgetsDecisions(ExpertStore):
    """The expert is written back without what had been decided."""

    def write_back(self, spec: Spec, meta: Meta, weights: memoryview, **more: Any) -> bool:
        meta = replace(meta, decided_stamp=NO_DECISIONS)
        return super().write_back(spec, meta, weights, **(more | {"decided": {}}))


class ForgetsVectors(ExpertStore):
    """The expert is written back without domain vectors."""

    def write_back(self, *expert: Any, **more: Any) -> bool:
        return super().write_back(*expert, **(more | {"vectors": {}}))


class ForgetsTheLine(ExpertStore):
    """The log does not tell that, and at which version, an expert was written back."""

    def write_back(self, *expert: Any, **more: Any) -> bool:
        return super().write_back(*expert, **(more | {"log": []}))


def _begins_lineage(expert: Expert, *, on: str, anchor: bool = True) -> bool:
    """An expert that is written back counts as a new one."""
    expert.meta = replace(expert.meta, lineage="of its own")
    return write_back(expert, on=on, anchor=anchor)


def _is_older(history: History, mine: Meta, found: Condition) -> bool:
    return found.meta is None or found.meta.version <= mine.version


def _number_of_a_run_counts(
    head: UpdateId | None, start: UpdateId | None, known: Sequence[UpdateId], run: str, n_kept: int
) -> tuple[HeadPlace, int]:
    place, count = locate(head, start, known, run, n_kept)
    is_stranger = place is HeadPlace.BEHIND and head and head.run != run
    return (
        (HeadPlace.FOREIGN, 0)
        if is_stranger and head.incarnation == UpdateId(run, 0).incarnation
        else (place, count)
    )


BROKEN_RECOVERY = {
    "E1_memory_is_not_kept": Broken(
        what="an aggregator throws its memory away at an error, without a look whether the server lost the expert",
        rules=Rules(server=ForgetsAtErrors),
        scope=Scope(units=1, faults={"empty": 1}),
        symptom="gone although aggregator",
    ),
    "E2_written_back_with_the_lease": Broken(
        what="only the holder of the lease writes an expert back",
        rules=Rules(server=RescuesWithTheLease),
        scope=Scope(aggregators=2, units=1, faults={"empty": 1}),
        symptom="gone although aggregator",
    ),
    "E3_written_over_what_is_there": Broken(
        what="an expert is written back without a look whether somebody else did so",
        rules=Rules(expert_store=Overwrites),
        scope=Scope(units=1, faults={"empty": 1, "late": 1}),
        symptom="written back over one that was there",
    ),
    "E4_written_back_without_decisions": Broken(
        what="an expert is written back without `decided`",
        rules=Rules(expert_store=ForgetsDecisions),
        scope=Scope(units=1, faults={"empty": 1}),
        symptom="a unit of training counts twice",
    ),
    "E5_written_back_as_a_new_lineage": Broken(
        what="an expert that is written back gets a new lineage",
        rules=Rules(patches=((consumers.recovery.settle, "write_back", _begins_lineage),)),
        scope=Scope(units=1, faults={"empty": 1}),
        symptom="nobody asked for the new lineage",
    ),
    "E6_log_does_not_tell": Broken(
        what="an expert is written back without a line in the log",
        rules=Rules(expert_store=ForgetsTheLine),
        scope=Scope(units=1, faults={"empty": 1}),
        symptom="a replay of the log gives",
    ),
    "E7_begun_anew": Broken(
        what="an aggregator that retains nothing makes a new expert where none is",
        rules=Rules(server=BeginsAnew),
        scope=Scope(units=1, faults={"empty": 1, "kill_aggregator": 1}),
        symptom="nobody asked for the new lineage",
    ),
    "E8_worker_gives_up": Broken(
        what="a worker does not wait for an expert that is gone",
        rules=Rules(worker_store=GivesUp),
        scope=Scope(units=1, faults={"empty": 1}),
        symptom="gave up",
    ),
    "E9_older_version_is_written_over": Broken(
        what="an aggregator writes over whatever is of an earlier version than it retains",
        rules=Rules(patches=((consumers.recovery.settle, "is_of_this_history", _is_older),)),
        scope=Scope(aggregators=2, units=1, max_norm=0.5, lag=1, faults={"lease": 1, "failover": 1}),
        symptom="is twice in the history",
    ),
    "E10_older_state_is_written_over_without_its_lines": Broken(
        what="the lines of the log that Redis lost are not written back",
        rules=Rules(expert_store=ForgetsTheLine),
        scope=Scope(units=1, lag=4, faults={"failover": 1}),
        symptom="a replay of the log gives",
    ),
    "E11_number_of_a_run_counts": Broken(
        what="a worker takes a run of its own number for a living stranger",
        rules=Rules(patches=((producers.ledger, "locate", _number_of_a_run_counts),)),
        scope=Scope(units=1, disk=False, faults={"failover": 1, "kill_worker": 1}),
        symptom="another process publishes under this worker's name",
    ),
    "E12_written_back_without_vectors": Broken(
        what="an expert is written back without the domain vectors of its workers",
        rules=Rules(expert_store=ForgetsVectors),
        scope=Scope(units=1, faults={"empty": 1}),
        symptom="no domain vector",
    ),
}
