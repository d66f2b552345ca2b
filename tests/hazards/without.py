"""Patches that each take one rule of the protocol out of the project's own code.

The other patches are in `tests/protocol/broken.py`, which takes rules out for the exhaustive search.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import redis.client

import consumers.expert
from consumers.decide import Admission, Outcome, Verdict, judge_header
from consumers.expert import Expert
from consumers.gateway.builder import GatewayBuilder
from fedmoe.errors import IncompleteUpdateError, SpecError
from fedmoe.protocol import condition, exact
from fedmoe.protocol.balance import Peers
from fedmoe.protocol.doorbell import Doorbell
from fedmoe.protocol.keys import GROUP
from fedmoe.protocol.records import Decided, Entry, Meta
from fedmoe.protocol.rollback import RolledBack
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.tail import Tail, TailRecord, record_field
from fedmoe.protocol.update import Header, UpdateId, make_run
from fedmoe.store.commit import Commit, Loaded
from fedmoe.store.connection import Connection
from fedmoe.store.expert import CONSUMER, ExpertStore
from fedmoe.store.worker import WorkerStore
from producers import ledger as ledger_module
from producers.checkpoint import Checkpoint, StateDir
from producers.exchange import TrainingState
from producers.ledger import Change, HeadPlace, Ledger, Outgoing
from producers.pull import Pulled, pull
from producers.sync import Sync

# ---- the aggregator ----


class CommitsByVersion(ExpertStore):
    """A commit compares the version, not the commit id, with that in memory."""

    def commit(self, commit: Commit) -> None:
        stored = Meta.from_hash(self._redis.hgetall(self.keys.meta))
        if stored.version == commit.meta.version - len(commit.log):
            commit.on = stored.commit
        super().commit(commit)


_watch = redis.client.Pipeline.watch


def watch_nothing(pipe: Any, *keys: str) -> Any:
    """WATCH a key that nobody writes."""
    return _watch(pipe, "nothing")


def watch_meta_alone(pipe: Any, *keys: str) -> Any:
    """WATCH the first of the keys."""
    return _watch(pipe, keys[0])


class ReclaimsWhatIsIdle(ExpertStore):
    """Only entries that have been pending for a minute are reclaimed."""

    def reclaim(self) -> list[Entry]:
        _, page, *_ = self._redis.xautoclaim(self.keys.updates, GROUP, CONSUMER, min_idle_time=60_000)
        return [Entry.of(*item) for item in page]


class GroupFromTheEnd(ExpertStore):
    """The consumer group starts at $."""

    def load(self) -> Loaded:
        with suppress(redis.ResponseError):
            self._redis.xgroup_create(self.keys.updates, GROUP, id="$", mkstream=True)
        return super().load()


class NeverMends(ExpertStore):
    """No aggregator checks the stream's highest id."""

    def mend(self) -> bool:
        return False


class LoadsWithoutLooking(ExpertStore):
    """A load does not check the types of the keys that a commit writes."""

    def load(self) -> Loaded:
        try:
            return super().load()
        except SpecError:
            pipe = self._redis.pipeline(transaction=True)
        pipe.get(self.keys.weights).hgetall(self.keys.meta).hgetall(self.keys.decided)
        weights, meta, decided = pipe.execute()
        heads = {worker.decode(): Decided.from_json(text) for worker, text in decided.items()}
        return Loaded(
            meta=Meta.from_hash(meta), weights=weights, decided=heads, packed_commit="", logged_version=-1, claims={},
            vectors={}, generation=self.connection.generation,
        )  # fmt: skip


class WritesBackWeightsAlone(ExpertStore):
    """A write-back leaves the server state out."""

    def write_back(self, *args: Any, **more: Any) -> bool:
        return super().write_back(*args, **(more | {"server_state": None}))


def connect_uncounted(connection: Connection, client: Any) -> None:
    """A reconnection is not noticed."""
    client.on_connect()


def counts_since_the_release(rules: RuleSet, rolled_back: RolledBack) -> int:
    """A rollback is not looked at."""
    return rules.released


class TrustsEntries(Expert):
    """`prev` and `base_version` are read from the stream entry, if it has them."""

    def decide(self, bell: Doorbell, raw: bytes, entry: Entry, commit: Commit) -> Verdict | None:
        def judge(
            header: Header, head: Decided | None, meta: Meta, spec: Spec, peers: Peers
        ) -> Verdict | Admission:
            said = entry.fields
            header = replace(header, base_version=int(said.get("base_version", header.base_version)))
            if "prev" in said:
                run, _, seq = said["prev"].rpartition(":")
                header = replace(header, prev=UpdateId(run, int(seq)) if run else None)
            return judge_header(header, head, meta, spec, peers)

        with patch.object(consumers.expert, "judge_header", judge):
            return super().decide(bell, raw, entry, commit)


class RefusesWhatIsNotWhole(Expert):
    """A missing or damaged header or part is a reason to refuse."""

    def decide(self, bell: Doorbell, raw: bytes, entry: Entry, commit: Commit) -> Verdict | None:
        verdict = super().decide(bell, raw, entry, commit)
        if not verdict or verdict.outcome is not Outcome.UNDECIDABLE:
            return verdict
        if not verdict.reason.endswith(("missing", "damaged")):
            return verdict
        self.decided[bell.worker] = commit.decided[bell.worker] = Decided(
            id=UpdateId(bell.run, bell.seq), how="refused", version=self.meta.version, reason=verdict.reason
        )
        return Verdict(Outcome.REFUSED, verdict.reason)


def judge_by_seq(
    header: Header, head: Decided | None, meta: Meta, spec: Spec, peers: Peers
) -> Verdict | Admission:
    """An update of the head's seq is a duplicate, whatever its run."""
    if head and header.seq == head.id.seq:
        return Verdict(Outcome.DUPLICATE)
    return judge_header(header, head, meta, spec, peers)


def staleness_by_the_clock(version: int, base_version: int) -> int:
    """An update ages by seconds, not by versions."""
    return int(time.time()) % 10


# ---- the gateway ----


class GatewayByVersion(GatewayBuilder):
    """A gateway of the same versions counts as up to date."""

    def refresh(self) -> bool:
        gateway = self._store.merged()
        present = {name: self._store.meta(name).version for name in self._store.experts()}
        if gateway and present == {name: one.version for name, one in gateway.experts.items()}:
            return False
        return super().refresh()


class GatewayByMemory(GatewayBuilder):
    """The builder compares with the gateway that it remembers, not with the one in Redis."""

    _seen: dict[str, str] | None = None

    def refresh(self) -> bool:
        present = {name: self._store.meta(name).commit for name in self._store.experts()}
        if present == self._seen:
            return False
        self._seen = present
        return super().refresh()


# ---- the worker ----


def pull_if_newer(store: WorkerStore, spec: Spec, *, known: str, **_: object) -> Pulled:
    """Weights are pulled when their version is higher than the base's."""
    pulled = pull(store, spec, known="")
    version = pulled.meta.version
    newer = not known or version > int(known.removeprefix("version "))
    meta = replace(pulled.meta, weights_commit=f"version {version}")
    return replace(pulled, meta=meta, weights=pulled.weights if newer else None)


class PublishesUnchecked(WorkerStore):
    """XADD without a check of the parts."""

    def publish(self, header: Header, parts: Sequence[bytes]) -> str:
        try:
            return super().publish(header, parts)
        except IncompleteUpdateError:
            ((entry, _),) = self._redis.xrevrange(self.keys.updates, count=1)
            return str(entry.decode())


class LeavesOncePublished(Sync):
    """A worker that is told to end does not wait for the decision."""

    def attempt(self) -> float:
        wait_s = super().attempt()
        self.has_ended |= self.times.is_ending and self.in_redis
        return wait_s


class SavesWhenDecided(Sync):
    """The checkpoint is written when an update is decided, not before it is published."""

    def _save(self, state: TrainingState) -> bool:
        return bool(self.ledger.queue) or super()._save(state)

    def _pull(self, seen: str = "") -> None:
        super()._pull(seen)
        if self._saver and not self.ledger.queue and (state := self._copy(consume=False)):
            self._save(state)


_load, _save = StateDir.load, StateDir.save
_roll_back, _advance, _forget, _start_over, _make_update = (
    Ledger._roll_back, Ledger._advance, Ledger._forget, Ledger._start_over, Ledger.make_update,
)  # fmt: skip


def load_as_new_run(self: StateDir, **whose: Any) -> Checkpoint | None:
    """A worker that resumes from its checkpoint begins a new run."""
    saved = _load(self, **whose)
    if saved:
        books = saved.ledger
        books.start, books.run, books.seq = books.head, make_run(int(books.run.split("-")[0]) + 1, "f" * 8), 0
        books.queue, books.kept = [], []
    return saved


def save_without_kept(self: StateDir, checkpoint: Checkpoint) -> None:
    """Decided updates are not in the checkpoint."""
    books = checkpoint.ledger
    _save(self, replace(checkpoint, ledger=replace(books, kept=[], start=books.head)))


def make_update_and_forget_the_vector(self: Ledger, *made: Any, **more: Any) -> Outgoing:
    """The first update of a process brings its vector, whatever becomes of it."""
    update = _make_update(self, *made, **more)
    self.has_told = True
    return update


def forget_all_but_the_last(self: Ledger, now: float) -> None:
    """Only the last decided update is kept."""
    self.keep_decided_s = -1.0
    _forget(self, now)


def roll_back_with_old_prev(self: Ledger, *seen: Any) -> Change:
    """The oldest kept update still names a predecessor that is gone."""
    prev = (self.kept or self.queue)[0].header.prev
    change = _roll_back(self, *seen)
    first = self.queue[0]
    self.queue[0] = replace(first, header=replace(first.header, prev=prev))
    return change


def advance_without_resending(
    self: Ledger, meta: Meta, weights: Any, decided: Decided | None, count: int, now: float
) -> Change:
    """Updates whose decision was undone are dropped."""
    self.kept = self.kept[:count]
    return _advance(self, meta, weights, decided, count, now)


def start_over_in_place(
    self: Ledger, meta: Meta, weights: Any, head: UpdateId | None, position: str
) -> Change:
    """A worker with an old checkpoint adopts the decided update, but not its data position."""
    return _start_over(self, meta, weights, head, "")


_locate = ledger_module.locate


def never_ahead(*chain: Any) -> tuple[HeadPlace, int]:
    """A later update of the worker's own run is mistaken for an earlier one."""
    place, count = _locate(*chain)
    return (HeadPlace.BEHIND if place is HeadPlace.AHEAD else place), count


def never_foreign(*chain: Any) -> tuple[HeadPlace, int]:
    """An update of a later run is mistaken for an earlier one."""
    place, count = _locate(*chain)
    return (HeadPlace.BEHIND if place is HeadPlace.FOREIGN else place), count


def locate_by_seq(
    head: UpdateId | None, start: UpdateId | None, known: Sequence[UpdateId], run: str, n_kept: int
) -> tuple[HeadPlace, int]:
    """Updates with the same seq count as the same update."""
    seqs = [update.seq for update in known]
    if head and head.seq in seqs:
        return HeadPlace.KNOWN, seqs.index(head.seq) + 1
    return _locate(head, start, known, run, n_kept)


def one_run(incarnation: int, nonce: str) -> str:
    """Every start of a worker has the same run."""
    return "1-00000000"


class NoLine:
    """The log line of a change does not hold the previous rules."""

    def __init__(self, *, version: int, changed: str, ended: object) -> None:
        self._fields = {"version": str(version), "restored": changed}

    def to_fields(self) -> dict[str, str]:
        """As an odd anchor."""
        return self._fields


# ---- snapshot and tail ----


def records_that_are_there(tail: Tail, version: int, stored: Mapping[bytes, bytes]) -> list[TailRecord]:
    """The updates of a tail are folded whatever they follow."""
    numbers = range(tail.snapshot_version + 1, version + 1)
    return [TailRecord.from_json(stored[record_field(number).encode()]) for number in numbers]


def no_digests(weights_commit: str, weights: object, server_state: object) -> str:
    """Nobody looks at values: the digests are those of nothing."""
    return ""


def whole_in_any_case(meta: Meta, **parts: object) -> str:
    """Nobody compares what the parts of an expert name."""
    return ""


NO_COMPARISON = (
    (condition, "damage", whole_in_any_case),
    (exact, "tail_records", records_that_are_there),
    (exact, "digests_of", no_digests),
    (consumers.expert, "digests_of", no_digests),
)
NO_DIGESTS = NO_COMPARISON[2:]


class LooksAtNoTail(ExpertStore):
    """Whether the tail is still there is not looked at."""

    def is_unchanged(self, meta: Meta, *, n_decided: int) -> bool:
        return super().is_unchanged(replace(meta, tail=replace(meta.tail, fields=0)), n_decided=n_decided)


def compact_without_comparing(expert: Expert) -> None:
    """The weights are written over those that are there, whatever was committed meanwhile."""
    commit = Commit(on=expert.meta.commit, generation=expert.generation, meta=expert.meta)
    meta, keys = expert.write_weights(commit, expert.next_meta()), expert.store.keys
    with expert.store.connection.client.pipeline(transaction=True) as pipe:
        pipe.set(keys.weights, bytes(expert.buffer.file))
        pipe.unlink(keys.tail)
        pipe.hset(keys.meta, mapping=meta.to_hash())
        pipe.execute()
    expert.history.attempt(meta.commit)
    expert.meta = meta
    expert.history.arrive(meta.commit)


_record_of = TailRecord.of


def record_without_momentum(*update: Any, **more: Any) -> TailRecord:
    """A record names no momentum: its reader takes the default."""
    return replace(_record_of(*update, **more), server_momentum=None)
