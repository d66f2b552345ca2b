"""The rules of the protocol taken out one by one, each with a scope in which that is found out.

What is replaced is the project's own code, by a subclass or a patch of a few lines; all else stays real.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import consumers.decide
import consumers.expert
import producers.membership
import producers.sync
import tests.protocol.worker
from consumers.decide import Admission, Outcome, Verdict, judge_header
from consumers.expert import Expert
from consumers.payload import fold_payload
from fedmoe.protocol.balance import Peers
from fedmoe.protocol.doorbell import Doorbell
from fedmoe.protocol.layout import values_of
from fedmoe.protocol.records import Decided, Entry, Meta
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Header
from fedmoe.store.commit import Commit, Loaded
from fedmoe.store.expert import ExpertStore
from fedmoe.store.worker import Poll, WorkerStore
from producers.pull import Pulled, pull
from tests.protocol.actors import Rules
from tests.protocol.state import Scope


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A rule taken out; `symptom` is part of what the search then says.

    Where an aggregator that remembers would make good what goes wrong, it remembers its last commit only (`history=1`).
    `is_long`: the search takes a minute or more, so the suite leaves it out, and tests/hazards shows the hazard.
    """

    what: str
    rules: Rules
    scope: Scope
    symptom: str
    is_long: bool = False


class AckFirst(ExpertStore):
    """Entries are taken off the stream as soon as they are read."""

    def read(self, *, block_ms: int, count: int) -> list[Entry]:
        entries = super().read(block_ms=block_ms, count=count)
        if entries:
            _take_off(self, [entry.id for entry in entries])
        return entries


class NeverCompares(ExpertStore):
    """Whether memory is still that of Redis is not looked at between two commits, which would end a stale memory."""

    def is_unchanged(self, meta: Meta, **_: Any) -> bool:
        return self.exists()


class NoReclaim(ExpertStore):
    """What another aggregator read and did not commit is nobody's."""

    def reclaim(self) -> list[Entry]:
        return []


class WritesBackFolded(Expert):
    """What was folded since the last commit goes back to an emptied server, too."""

    def _revert(self, meta: Meta, decided: dict[str, Decided], vectors: dict[str, str]) -> None:
        self.held = self._folded


class StateBesideTheCommit(ExpertStore):
    """The server state is written first, and then the rest is committed."""

    def commit(self, commit: Commit) -> None:
        if commit.server_state is not None:
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.set(self.keys.server_state, bytes(commit.server_state))
                pipe.execute()
        commit.server_state = None
        super().commit(commit)


class TornLoad(ExpertStore):
    """Weights and meta are read one after the other."""

    def load(self) -> Loaded:
        weights = self._redis.get(self.keys.weights)
        return replace(super().load(), weights=weights)


def _take_off(store: ExpertStore, entries: list[str]) -> None:
    pipe = store.connection.client.pipeline(transaction=True)
    pipe.xack(store.keys.updates, "aggregator", *entries)
    pipe.xdel(store.keys.updates, *entries)
    pipe.execute()


class BareRemoval(Expert):
    """Duplicates and undecidable entries are removed without a commit."""

    def commit(self, commit: Commit) -> None:
        if commit.decided or commit.dead:
            super().commit(commit)
        else:
            _take_off(self.store, commit.entries)


class DuplicateDecides(Expert):
    """A duplicate is noted as the worker's last decision."""

    def decide(self, bell: Doorbell, raw: bytes, entry: Entry, commit: Commit) -> Verdict | None:
        verdict = super().decide(bell, raw, entry, commit)
        if verdict and verdict.outcome is Outcome.DUPLICATE:
            head = replace(self.decided[bell.worker], how="duplicate")
            self.decided[bell.worker] = commit.decided[bell.worker] = head
        return verdict


def _torn_pull(store: WorkerStore, spec: Spec, *, known: str, **_: object) -> Pulled:
    """Weights and one's own decision are read one after the other."""
    weights = values_of(spec.layout, store.connection.client.get(store.keys.weights)).clone()
    pulled = pull(store, spec, known=known)
    return replace(pulled, weights=weights if pulled.weights is not None else None)


def _pull_by_version(store: WorkerStore, spec: Spec, *, known: str, **_: object) -> Pulled:
    """Equal version numbers are taken for equal weights."""
    pulled = pull(store, spec, known="")
    meta = replace(pulled.meta, weights_commit=f"version {pulled.meta.version}")
    return replace(pulled, meta=meta, weights=None if meta.weights_commit == known else pulled.weights)


def pulling(instead: Callable[..., Pulled]) -> tuple[tuple[Any, str, Any], ...]:
    """The patches that have a worker pull otherwise."""
    return tuple(
        (where, "pull", instead) for where in (producers.membership, producers.sync, tests.protocol.worker)
    )


class NoResending(WorkerStore):
    """An entry that is gone without a decision is not missed."""

    def poll(self, entry_id: str, header: Header) -> Poll:
        return replace(super().poll(entry_id, header), entry_waits=True)


def _any_prev(
    header: Header, head: Decided | None, meta: Meta, spec: Spec, peers: Peers
) -> Verdict | Admission:
    if head and header.run == head.id.run and header.seq <= head.id.seq:
        return Verdict(Outcome.DUPLICATE)
    return judge_header(replace(header, prev=head.id if head else None), head, meta, spec, peers)


def _any_lineage(
    header: Header, head: Decided | None, meta: Meta, spec: Spec, peers: Peers
) -> Verdict | Admission:
    return judge_header(replace(header, lineage=meta.lineage), head, meta, spec, peers)


def _first_rules_judge(
    header: Header, head: Decided | None, meta: Meta, spec: Spec, peers: Peers
) -> Verdict | Admission:
    judged = judge_header(header, head, meta, spec, peers)
    if not isinstance(judged, Admission):
        return judged
    return replace(judged, step=replace(judged.step, factor=1.0))


def change_in_place(store: ExpertStore, settings: Mapping[str, Any], *, clock: object = None) -> None:
    """The new rules, and the old commit id."""
    meta = store.condition().meta
    assert meta is not None
    pipe = store.connection.client.pipeline(transaction=True)
    pipe.hset(store.keys.meta, mapping={"rules": meta.rules.changed(settings).to_json()})
    pipe.execute()


def _missing_is_refused(*args: Any) -> Verdict:
    verdict = fold_payload(*args)
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
        symptom="is twice in the history",
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
        rules=Rules(patches=pulling(_pull_by_version), history=1),
        scope=Scope(workers=2, units=1, lag=3, faults={"failover": 1}),
        symptom="times in local",
        is_long=True,
    ),
    "H6_pull_as_two_reads": Broken(
        what="a worker reads the weights, then its own decision",
        rules=Rules(patches=pulling(_torn_pull)),
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
        rules=Rules(patches=((consumers.expert, "fold_payload", _missing_is_refused),)),
        scope=Scope(units=1, faults={"expire": 1}),
        symptom="refused without cause",
    ),
    "H9_removal_without_commit": Broken(
        what="duplicates and undecidable entries are removed by a bare XACK and XDEL",
        rules=Rules(expert=BareRemoval, expert_store=NeverCompares),
        scope=Scope(aggregators=2, faults={"lease": 2}),
        symptom="for ever",
    ),
    "H10_duplicate_overwrites_decision": Broken(
        what="a duplicate is written to `decided`",
        rules=Rules(expert=DuplicateDecides),
        scope=Scope(workers=2, units=1, max_staleness=0, faults={"lost": 1}),
        symptom="the expert is damaged: its hash of decided updates",
    ),
    "H11_no_load_after_reconnect": Broken(
        what="an aggregator does not load again when its connection was opened again",
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
    "H23_rules_changed_without_a_commit": Broken(
        what="the operator writes the new rules into meta without a new commit id",
        rules=Rules(change=change_in_place),
        scope=Scope(units=1, faults={"rules": 1}),
        symptom="passed over",
    ),
    "H23_decided_under_the_first_rules": Broken(
        what="an aggregator decides under the rules that the expert was created with",
        rules=Rules(patches=((consumers.expert, "judge_header", _first_rules_judge),)),
        scope=Scope(units=1, faults={"rules": 1}),
        symptom="replay",
    ),
    "H25_state_beside_the_commit": Broken(
        what="the server state is written first, and then the rest is committed",
        rules=Rules(expert_store=StateBesideTheCommit),
        scope=Scope(momentum=0.5),
        symptom="the server state is",
    ),
    "H26_held_expert_is_served_on": Broken(
        what="an aggregator decides updates of a held expert",
        rules=Rules(patches=((Expert, "is_held", False),)),
        scope=Scope(units=1, faults={"hold": 1}),
        symptom="applied while the expert was held",
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
}
