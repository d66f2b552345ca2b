"""The rules of the protocol taken out one by one, each with a scope in which that is found out.

What is replaced is the project's own code, by a subclass or a patch of a few lines; all else stays real.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import consumers.decide
import consumers.expert
import consumers.recovery
import producers.ledger
from consumers.aggregator import ExpertServer
from consumers.decide import Outcome, Verdict, judge_header, judge_payload
from consumers.doorbell import Doorbell
from consumers.expert import Expert
from fedmoe.errors import LostExpertError, RefusedError
from fedmoe.layout import AdapterBuffer, values_of
from fedmoe.records import NO_DECISIONS, Decided, Entry, Meta
from fedmoe.spec import Spec
from fedmoe.store.expert import Commit, ExpertStore, Loaded
from fedmoe.store.lifecycle import Condition
from fedmoe.store.worker import Poll, Snapshot, WorkerStore
from fedmoe.update import Header, UpdateId
from producers.ledger import Place, locate
from tests.protocol.actors import Rules, make_spec
from tests.protocol.state import Scope


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A rule taken out; `symptom` is part of what the search then says.

    Where an aggregator that remembers would make good what goes wrong, it remembers its last commit only (`history=1`).
    """

    what: str
    rules: Rules
    scope: Scope
    symptom: str


class AckFirst(ExpertStore):
    """Entries are taken off the stream as soon as they are read."""

    def read(self, *, block_ms: int, count: int) -> list[Entry]:
        entries = super().read(block_ms=block_ms, count=count)
        if entries:
            _take_off(self, [entry.id for entry in entries])
        return entries


class NoReclaim(ExpertStore):
    """What another aggregator read and did not commit is nobody's."""

    def reclaim(self) -> list[Entry]:
        return []


class WritesBackFolded(Expert):
    """What was folded since the last commit goes back to an emptied server, too."""

    def _revert(self, meta: Meta, applied: dict[str, Decided]) -> None:
        self.buffer = self._folded


class TornLoad(ExpertStore):
    """Weights and meta are read one after the other."""

    def load(self) -> Loaded:
        weights = self._redis.get(self.keys.weights)
        return replace(super().load(), weights=weights)


def _take_off(store: ExpertStore, entries: list[str]) -> None:
    pipe = store._redis.pipeline(transaction=True)
    pipe.xack(store.keys.updates, "aggregator", *entries)
    pipe.xdel(store.keys.updates, *entries)
    pipe.execute()


class BareRemoval(Expert):
    """Duplicates and undecidable entries are removed without a commit."""

    def _commit(self, commit: Commit) -> None:
        if commit.applied or commit.dead:
            super()._commit(commit)
        else:
            _take_off(self.store, commit.entries)


class DuplicateDecides(Expert):
    """A duplicate is noted as the worker's last decision."""

    def _decide(self, bell: Doorbell, raw: bytes, entry: Entry, commit: Commit) -> Verdict | None:
        verdict = super()._decide(bell, raw, entry, commit)
        if verdict and verdict.outcome is Outcome.DUPLICATE:
            head = replace(self.applied[bell.worker], how="duplicate")
            self.applied[bell.worker] = commit.applied[bell.worker] = head
        return verdict


class TornPull(WorkerStore):
    """Weights and one's own decision are read one after the other."""

    def pull(self, spec: Spec, *, known: str) -> Snapshot:
        weights = values_of(spec.layout, self._redis.get(self.keys.weights)).clone()
        snapshot = super().pull(spec, known=known)
        return replace(snapshot, weights=weights if snapshot.weights is not None else None)


class PullByVersion(WorkerStore):
    """Equal version numbers are taken for equal weights."""

    def pull(self, spec: Spec, *, known: str) -> Snapshot:
        snapshot = super().pull(spec, known="")
        meta = replace(snapshot.meta, weights_commit=f"version {snapshot.meta.version}")
        return replace(
            snapshot, meta=meta, weights=None if meta.weights_commit == known else snapshot.weights
        )


class NoResending(WorkerStore):
    """An entry that is gone without a decision is not missed."""

    def poll(self, entry_id: str, header: Header) -> Poll:
        return replace(super().poll(entry_id, header), entry_waits=True)


class ForgetsAtErrors(ExpertServer):
    """An aggregator's memory is thrown away without a look whether the server has still what it is a copy of."""

    def _rescue(self, expert: Expert) -> None:
        self._expert = None


class RescuesWithTheLease(ExpertServer):
    """Who has not the lease writes nothing back."""

    def _rescue(self, expert: Expert) -> None:
        if self._lease.hold():
            super()._rescue(expert)


class Overwrites(ExpertStore):
    """What an aggregator remembers is written whatever is there by now."""

    def write_back(self, spec: Spec, meta: Meta, weights: memoryview, **more: Any) -> bool:
        pipe = self._redis.pipeline(transaction=True)
        self._queue_parts(pipe, spec, meta, weights, None)
        if more["applied"]:
            pipe.hset(self.keys.applied, mapping={w: d.to_json() for w, d in more["applied"].items()})
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
            spec = make_spec(workers=1, units=1, max_staleness=9, max_norm=9.0)
            buffer = AdapterBuffer(spec.layout)
            meta = Meta(lineage="another", commit="c98", weights_commit="c98", spec=spec.digest)
            self._store.create(spec, meta, buffer.file)
            raise


class GivesUp(WorkerStore):
    """A worker whose expert is gone ends."""

    def poll(self, entry_id: str, header: Header) -> Poll:
        try:
            return super().poll(entry_id, header)
        except LostExpertError as error:
            raise RefusedError(str(error)) from error


class ForgetsDecisions(ExpertStore):
    """The expert is written back without what had been decided."""

    def write_back(self, spec: Spec, meta: Meta, weights: memoryview, **more: Any) -> bool:
        meta = replace(meta, decided_stamp=NO_DECISIONS)
        return super().write_back(spec, meta, weights, **(more | {"applied": {}}))


class ForgetsTheLine(ExpertStore):
    """The log does not tell that, and at which version, an expert was written back."""

    def write_back(self, *expert: Any, **more: Any) -> bool:
        return super().write_back(*expert, **(more | {"log": []}))


class BeginsLineage(Expert):
    """An expert that is written back counts as a new one."""

    def write_back(self, *, on: str, anchor: bool = True) -> bool:
        self.meta = replace(self.meta, lineage="of its own")
        return super().write_back(on=on, anchor=anchor)


def _is_older(expert: Expert, found: Condition) -> bool:
    return found.meta is None or found.meta.version <= expert.meta.version


def _number_of_a_run_counts(
    head: UpdateId | None, start: UpdateId | None, known: Sequence[UpdateId], run: str, n_kept: int
) -> tuple[Place, int]:
    place, count = locate(head, start, known, run, n_kept)
    is_stranger = place is Place.BEHIND and head and head.run != run
    return (Place.FOREIGN, 0) if is_stranger and head.epoch == UpdateId(run, 0).epoch else (place, count)


def _any_prev(header: Header, head: Decided | None, meta: Meta, spec: Spec, workers: int) -> Verdict:
    if head and header.run == head.id.run and header.seq <= head.id.seq:
        return Verdict(Outcome.DUPLICATE)
    return judge_header(replace(header, prev=head.id if head else None), head, meta, spec, workers)


def _any_lineage(header: Header, head: Decided | None, meta: Meta, spec: Spec, workers: int) -> Verdict:
    return judge_header(replace(header, lineage=meta.lineage), head, meta, spec, workers)


def _missing_is_refused(*args: Any) -> Verdict:
    verdict = judge_payload(*args)
    return replace(verdict, outcome=Outcome.REFUSED) if verdict.outcome is Outcome.UNDECIDABLE else verdict


def _commit_id_of_version(expert: Expert) -> str:
    return f"version {expert.meta.version}"


BROKEN = {
    "H1_no_watch": Broken(
        what="a commit does not WATCH meta",
        rules=Rules(watches=False),
        scope=Scope(aggregators=2, units=1, faults={"lease": 1}),
        symptom="twice",
    ),
    "H1_commits_compare_versions": Broken(
        what="a commit compares versions instead of commit ids",
        rules=Rules(commit_ids=_commit_id_of_version),
        scope=Scope(aggregators=2, max_norm=0.5, faults={"lease": 1}),
        symptom="twice",
    ),
    "H2_prev_not_checked": Broken(
        what="an update is accepted if its seq is above the last one's, whatever its prev",
        rules=Rules(patches=((consumers.expert, "judge_header", _any_prev),), history=1),
        scope=Scope(faults={"failover": 1}),
        symptom="0 times in local",
    ),
    "H3_no_reclaim": Broken(
        what="what a dead aggregator had read is not reclaimed",
        rules=Rules(expert_store=NoReclaim),
        scope=Scope(units=1, faults={"kill_aggregator": 1}),
        symptom="entries stay",
    ),
    "H3_reclaim_only_at_load": Broken(
        what="the holder of the lease reclaims only when it loads",
        rules=Rules(reclaims_now_and_then=False),
        scope=Scope(workers=2, aggregators=2, units=1, faults={"lease": 1}),
        symptom="entries stay",
    ),
    "H4_keeps_only_the_last_decided": Broken(
        what="a worker keeps only its last decided update",
        rules=Rules(keep_decided_s=-1.0),
        scope=Scope(lag=12, faults={"failover": 1}),
        symptom="0 times in local",
    ),
    "H5_checkpoint_after_publishing": Broken(
        what="the checkpoint is written when an update is decided, not before it is published",
        rules=Rules(saves_before=False),
        scope=Scope(faults={"kill_worker": 1}),
        symptom="two contents",
    ),
    "H6_pull_by_version": Broken(
        what="a worker compares versions instead of commit ids when it pulls",
        rules=Rules(worker_store=PullByVersion, history=1),
        scope=Scope(workers=2, units=1, lag=3, faults={"failover": 1}),
        symptom="times in local",
    ),
    "H6_pull_as_two_reads": Broken(
        what="a worker reads the weights, then its own decision",
        rules=Rules(worker_store=TornPull),
        scope=Scope(workers=2, units=1),
        symptom="local is not the expert's weights",
    ),
    "H7_run_used_again": Broken(
        what="a worker without a state directory begins its run anew under the same name",
        rules=Rules(new_run_at_start=False),
        scope=Scope(disk=False, faults={"kill_worker": 1}),
        symptom="two contents",
    ),
    "H8_missing_part_is_refused": Broken(
        what="an update with a missing part is refused",
        rules=Rules(patches=((consumers.expert, "judge_payload", _missing_is_refused),)),
        scope=Scope(units=1, faults={"expire": 1}),
        symptom="refused without cause",
    ),
    "H9_removal_without_commit": Broken(
        what="duplicates and undecidable entries are removed by a bare XACK and XDEL",
        rules=Rules(expert=BareRemoval),
        scope=Scope(aggregators=2, faults={"lease": 2}),
        symptom="for ever",
    ),
    "H10_duplicate_overwrites_decision": Broken(
        what="a duplicate is written to `applied`",
        rules=Rules(expert=DuplicateDecides),
        scope=Scope(workers=2, units=1, max_staleness=0, faults={"lost": 1}),
        symptom="times in local",
    ),
    "H11_no_load_after_reconnect": Broken(
        what="an aggregator does not load again when its connection was made anew",
        rules=Rules(counts_connections=False),
        scope=Scope(workers=2, units=1, disk=False, lag=2, faults={"failover": 1, "leave": 1}),
        symptom="lost",
    ),
    "H12_group_from_the_end": Broken(
        what="the consumer group starts at $",
        rules=Rules(group_start="$"),
        scope=Scope(units=1),
        symptom="entries stay",
    ),
    "H13_negative_staleness": Broken(
        what="staleness is version - base_version, also below 0",
        rules=Rules(patches=((consumers.decide, "staleness_of", int.__sub__),), history=1),
        scope=Scope(workers=2, units=1, lag=3, faults={"failover": 1}),
        symptom="negative",
    ),
    "H15_load_as_two_reads": Broken(
        what="an aggregator reads the weights, then meta",
        rules=Rules(expert_store=TornLoad),
        scope=Scope(aggregators=2, faults={"lease": 1}),
        symptom="replay",
    ),
    "H16_lineage_not_checked": Broken(
        what="an update of another lineage is accepted",
        rules=Rules(patches=((consumers.expert, "judge_header", _any_lineage),)),
        scope=Scope(units=1, faults={"new_lineage": 1}),
        symptom="another lineage",
    ),
    "acknowledged_before_commit": Broken(
        what="entries are acknowledged and deleted when they are read",
        rules=Rules(expert_store=AckFirst),
        scope=Scope(units=1, disk=False, faults={"kill_aggregator": 1, "leave": 1}),
        symptom="lost",
    ),
    "no_resending": Broken(
        what="a worker does not send again what is gone without a decision",
        rules=Rules(worker_store=NoResending),
        scope=Scope(units=1, faults={"trim": 1}),
        symptom="stuck",
    ),
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
        what="an expert is written back without `applied`",
        rules=Rules(expert_store=ForgetsDecisions),
        scope=Scope(units=1, faults={"empty": 1}),
        symptom="a unit of training counts twice",
    ),
    "E5_written_back_as_a_new_lineage": Broken(
        what="an expert that is written back gets a new lineage",
        rules=Rules(expert=BeginsLineage),
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
        what="an aggregator that remembers nothing makes a new expert where none is",
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
        what="an aggregator writes over whatever is of an earlier version than it remembers",
        rules=Rules(patches=((consumers.recovery.Recovery, "_is_of_this_history", staticmethod(_is_older)),)),
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
}
