"""The worker's books: `local = base + pending + progress`, which counts each unit of training once. Pure.

    base      the weights last pulled, and their commit
    pending   the updates that are published but not decided, as the aggregator will decode them
    progress  all training that is in no update: local − base − pending

The ledger does not store `local`, because the training changes it all the time. Instead every observation of Redis
gives a `correction` to add to `local`. With W the weights now in Redis and Q, Q' the pending updates before and after,

    correction = (W + ΣQ') − (base + ΣQ)

leaves progress unchanged in every case: an update was applied (it is in W), refused (it is in neither), or a failover
undid its decision (it is in Q' again). The quantisation error is not in pending, so it stays in progress; this is error
feedback without extra code.

A worker's updates form a chain: each names its predecessor `prev`, and the aggregator decides only the successor of
the `head`, the last decided update. `kept` holds decided updates long enough to resend them after a rollback.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto

import torch

from fedmoe.errors import NameTakenError
from fedmoe.protocol import features
from fedmoe.protocol.codec import EncodedUpdate, add, cut, scratch_values
from fedmoe.protocol.records import Decided, Meta
from fedmoe.protocol.update import Header, Part, UpdateId
from fedmoe.protocol.validation import Measured
from fedmoe.protocol.vectors import DomainVector
from producers.spares import Spares


@dataclass(frozen=True, slots=True)
class Outgoing:
    """An update and its parts, as published; `decided_at` is in seconds of the worker's monotonic clock."""

    header: Header
    parts: tuple[bytes, ...]
    decided_at: float = 0.0

    @property
    def id(self) -> UpdateId:
        """(run, seq)."""
        return self.header.id

    def add_to(self, total: torch.Tensor, scratch: torch.Tensor, *, sign: float = 1.0) -> None:
        """Add Δ as the aggregator decodes it to `total` (numel,) fp32; with sign −1 subtract it (see codec.add)."""
        add(self.parts, self.header.wire_format, total, factor=sign, out=total, scratch=scratch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Counts of the training since the last update, for the next update's header."""

    n_examples: int = 0
    n_tokens: int = 0
    steps: int = 0
    loss_sum: float = 0.0
    position: str = ""

    @property
    def loss(self) -> float:
        """Mean loss of the steps."""
        return self.loss_sum / self.steps if self.steps else float("nan")


class HeadPlace(Enum):
    """Where the head in Redis lies relative to the worker's own chain."""

    KNOWN = auto()  # at one of its updates, or at the start of its chain
    BEHIND = auto()  # before all updates that it keeps: a deep rollback
    AHEAD = auto()  # at a later update of this run: an old checkpoint was restored here
    FOREIGN = auto()  # at a later run, which began after this one: another process has this name


def locate(
    head: UpdateId | None, start: UpdateId | None, known: Sequence[UpdateId], run: str, n_kept: int = 0
) -> tuple[HeadPlace, int]:
    """Return where `head` lies in the chain `start` → known[0] → …, and for KNOWN how many of `known` are decided.

    The first `n_kept` of `known` were decided at the last observation.
    """
    if head in known:
        return HeadPlace.KNOWN, known.index(head) + 1
    if head == start:
        return HeadPlace.KNOWN, 0
    if head is None:
        return HeadPlace.BEHIND, 0
    mine = UpdateId(run, 0)
    if head.run == run:
        last = max((u.seq for u in (*known, start or mine) if u.run == run), default=0)
        return (HeadPlace.AHEAD, 0) if head.seq > last else (HeadPlace.BEHIND, 0)
    if head.incarnation < mine.incarnation:
        return HeadPlace.BEHIND, 0
    # Redis gives two runs the same incarnation only if a rollback removed the first one. Until an update of this run
    # is decided, this run is the later one, and its chain continues after the other run.
    begun = any(update.run == run for update in (start, *known[:n_kept]) if update)
    return (
        (HeadPlace.BEHIND, 0)
        if head.incarnation == mine.incarnation and not begun
        else (HeadPlace.FOREIGN, 0)
    )


def _is_later(head: UpdateId | None, start: UpdateId | None) -> bool:
    """True if `head` comes after `start` in a worker's life."""
    if head is None or start is None:
        return head is not None
    return (head.incarnation, head.seq) > (start.incarnation, start.seq)


@dataclass(frozen=True, slots=True)
class Change:
    """The result of an observation of Redis.

    Args:
        correction: (numel,) fp32 to add to local, None if neither weights nor pending changed.
        replace: set local to `correction` instead; this discards all local training.
        rolled_back: an operator rolled the expert back: what was trained on the old base is dropped; with `replace`.
        decided: updates decided since the last observation, oldest first; `how` is the decision of the last one.
        resent: updates whose decision a failover undid; they are pending again.
        lost: range of decided updates that a rollback undid and the worker no longer keeps, as text; "" for none.
        dropped: undecided updates of an abandoned history; only with `replace`.
        position: the data position to move to, "" to stay.
    """

    correction: torch.Tensor | None = None
    replace: bool = False
    decided: tuple[UpdateId, ...] = ()
    how: Decided | None = None
    resent: tuple[UpdateId, ...] = ()
    lost: str = ""
    dropped: tuple[UpdateId, ...] = ()
    position: str = ""
    rolled_back: bool = False


def _is_taken_back(before: Meta, meta: Meta, change: Change) -> bool:
    """True if the progress was trained on weights, or on top of an own update, that an operator rolled back meanwhile.

    Updates of such a base are refused; but this progress is in no update yet, and its base will be a newer one.
    """
    how, known = change.how, before.rolled_back
    if meta.rolled_back.takes_back(before.version, known):
        return True
    # If several own updates were decided at once, only the decision of the last one is known.
    is_unknown = len(change.decided) > 1 and meta.rolled_back != known
    return is_unknown or (how is not None and how.how == "applied" and meta.rolled_back.holds(how.version))


@dataclass
class Ledger:
    """A worker's books for one expert.

    Args:
        base: (numel,) fp32, the weights last pulled; meta: the expert's state then.
        packed: the bytes that the base was unpacked from, () if it is exact.
        run: this worker's run; seq: of its last update.
        start: the update before the oldest one that is kept; None at the beginning of the worker's life.
        queue: undecided updates in order; the first is the one in flight.
        kept: decided updates, oldest first; at least the last one.
        vector: this worker's domain vector, which updates bring until one of them is applied (`has_told`); None: they
            bring none.
        keep_decided_s, keep_decided_bytes: how many seconds decided updates are kept, and their maximum size (bytes).

    Attributes:
        spares: from which the ledger takes the vectors it makes, and to which it gives each base that it replaces.
    """

    base: torch.Tensor
    meta: Meta
    run: str
    seq: int = 0
    start: UpdateId | None = None
    queue: list[Outgoing] = field(default_factory=list)
    kept: list[Outgoing] = field(default_factory=list)
    packed: tuple[bytes, ...] = ()
    vector: DomainVector | None = None
    has_told: bool = False
    keep_decided_s: float = 60.0
    keep_decided_bytes: int = 256 * 1024 * 1024
    spares: Spares = field(init=False, repr=False, compare=False)
    _scratch: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.spares = Spares(len(self.base))
        self._scratch = torch.empty_like(self.base[: scratch_values(len(self.base))])

    @property
    def head(self) -> UpdateId | None:
        """The last update known to be decided."""
        return self.kept[-1].id if self.kept else self.start

    def pending(self) -> torch.Tensor:
        """Sum of the undecided updates (numel,) fp32."""
        total = torch.zeros_like(self.base)
        for update in self.queue:
            update.add_to(total, self._scratch)
        return total

    def progress(self, local: torch.Tensor) -> torch.Tensor:
        """Local − base − pending, (numel,) fp32, in memory of its own."""
        progress = torch.sub(local, self.base, out=self.spares.take())
        for update in self.queue:
            update.add_to(progress, self._scratch, sign=-1.0)
        return progress

    def cut(self, local: torch.Tensor, wire_format: str) -> EncodedUpdate:
        """The progress, local − base − pending, encoded as the parts of an update, with its L2 norm."""
        if self.queue:
            progress = self.progress(local)
            encoded = cut(progress, wire_format)
            self.spares.give(progress)
            return encoded
        return cut(local, wire_format, minus=self.base)

    def make_update(
        self,
        cut: EncodedUpdate,
        trained: Trained,
        *,
        fingerprint: str,
        tokenizer: str = "",
        measured: Measured | None = None,
    ) -> Outgoing:
        """Make the result of `cut` the next update and append it to the queue."""
        vector = None if self.has_told else self.vector
        self.seq += 1
        header = Header(
            lineage=self.meta.lineage,
            spec=self.meta.spec,
            run=self.run,
            seq=self.seq,
            prev=self.queue[-1].id if self.queue else self.head,
            base_version=self.meta.version,
            wire_format=cut.wire_format,
            base_fingerprint=fingerprint,
            tokenizer=tokenizer,
            n_examples=trained.n_examples,
            n_tokens=trained.n_tokens,
            steps=trained.steps,
            loss=trained.loss,
            position=trained.position,
            parts=tuple(Part.of(part) for part in cut.parts),
            requires=features.with_feature(features.UPDATES_REQUIRE, features.QUICK_DIGESTS, True),
            vector=vector.values if vector else None,
            vector_rows=vector.rows if vector else 0,
            **(measured.fields if measured else {}),
        )
        self.queue.append(Outgoing(header, cut.parts))
        return self.queue[-1]

    def to_send(self) -> tuple[Header, tuple[bytes, ...]]:
        """Header and parts of the first undecided update; its base version is lowered to what the rules allow.

        A validation loss of a version that the expert has not reached again after a failover is left out.
        """
        update, rules = self.queue[0], self.meta.rules.aggregation
        header = update.header.at_most(self.meta.version + rules.staleness_bound(0))
        if (header.val_version or 0) > self.meta.version:
            header = header.unmeasured()
        return header, update.parts

    def _chain(self) -> list[Outgoing]:
        return [*self.kept, *self.queue]

    def observe(
        self,
        meta: Meta,
        weights: torch.Tensor | None,
        decided: Decided | None,
        *,
        now: float,
        packed: tuple[bytes, ...] = (),
    ) -> Change:
        """Update the books from what one MULTI read in Redis; `weights` None means that the base is still current.

        The ledger takes ownership of `weights`, which become the base, and the caller may no longer use the old base.
        The caller owns the correction, and may give it to `spares` once it is added.
        `packed` are the bytes from which the weights were unpacked.

        Raises:
            NameTakenError: if another process publishes under this worker's name. An error leaves the books unchanged.
        """
        before = self.meta
        change = self._reconcile(meta, weights, decided, now)
        if weights is not None:
            self.packed = packed
        if change.replace or not _is_taken_back(before, meta, change):
            return change
        local = self.base + self.pending()
        return replace(change, correction=local, replace=True, rolled_back=True)

    def _reconcile(
        self, meta: Meta, weights: torch.Tensor | None, decided: Decided | None, now: float
    ) -> Change:
        head = decided.id if decided else None
        if meta.lineage != self.meta.lineage:
            return self._start_over(meta, self._moved(weights), head, "")
        place, count = locate(head, self.start, [u.id for u in self._chain()], self.run, len(self.kept))
        match place:
            case HeadPlace.FOREIGN:
                raise NameTakenError(
                    f"another process publishes under this worker's name (its run {head.run if head else ''}, "
                    f"ours {self.run}): give one of them another --name",
                    about="run",
                )
            case HeadPlace.AHEAD:
                assert decided is not None
                self.seq = decided.id.seq
                return self._start_over(meta, self._moved(weights), head, decided.position)
            case HeadPlace.BEHIND:
                return self._roll_back(meta, weights, head)
        return self._advance(meta, weights, decided, count, now)

    def _moved(self, weights: torch.Tensor | None) -> torch.Tensor:
        return self.base if weights is None else weights

    def _start_over(self, meta: Meta, weights: torch.Tensor, head: UpdateId | None, position: str) -> Change:
        dropped = tuple(update.id for update in self.queue)
        self.base, self.meta, self.start, self.queue, self.kept = weights, meta, head, [], []
        self.has_told = False
        return Change(correction=weights.clone(), replace=True, dropped=dropped, position=position)

    def _roll_back(self, meta: Meta, weights: torch.Tensor | None, head: UpdateId | None) -> Change:
        chain = self._chain()
        if chain:
            chain[0] = replace(chain[0], header=replace(chain[0].header, prev=head))
        resent = tuple(update.id for update in self.kept)
        # A head later than ours is no rollback: an update that an earlier run left in the stream was decided.
        is_rollback = bool(resent) or not _is_later(head, self.start)
        lost = f"after {head or 'the beginning'} up to {self.start}" if is_rollback else ""
        correction = self._settle(meta, weights, kept=[], queue=chain)
        self.start, self.has_told = head, False
        return Change(correction=correction, resent=resent, lost=lost)

    def _advance(
        self, meta: Meta, weights: torch.Tensor | None, decided: Decided | None, count: int, now: float
    ) -> Change:
        before = len(self.kept)
        chain = self._chain()
        fresh = [replace(update, decided_at=now) for update in chain[before:count]]
        kept = chain[: min(before, count)] + fresh
        resent = tuple(update.id for update in chain[count:before])
        # An update that an earlier start made may bring another vector than this start's.
        if decided and decided.how == "applied" and fresh and self.vector is not None:
            header = fresh[-1].header
            if (header.vector, header.vector_rows) == (self.vector.values, self.vector.rows):
                self.has_told = True
        correction = self._settle(meta, weights, kept=kept, queue=chain[count:])
        self._forget(now)
        return Change(
            correction, decided=tuple(u.id for u in fresh), how=decided if fresh else None, resent=resent
        )

    def _settle(
        self, meta: Meta, weights: torch.Tensor | None, *, kept: list[Outgoing], queue: list[Outgoing]
    ) -> torch.Tensor | None:
        """Adopt base, kept and queue; return the correction that leaves progress unchanged."""
        old, new = {u.id for u in self.queue}, {u.id for u in queue}
        correction = None
        if weights is not None:
            correction = torch.sub(weights, self.base, out=self.spares.take())
        elif old != new:
            correction = self.spares.take().zero_()
        for update in (*self.queue, *queue):
            if correction is not None and (update.id in old) != (update.id in new):
                update.add_to(correction, self._scratch, sign=1.0 if update.id in new else -1.0)
        if weights is not None:
            self.spares.give(self.base)
            self.base = weights
        self.meta, self.kept, self.queue = meta, kept, queue
        return correction

    def _forget(self, now: float) -> None:
        """Drop decided updates that are too old or exceed the bytes to keep; at least the last one stays."""
        total = sum(update.header.payload_bytes for update in self.kept)
        while len(self.kept) > 1 and (
            now - self.kept[0].decided_at > self.keep_decided_s or total > self.keep_decided_bytes
        ):
            total -= self.kept[0].header.payload_bytes
            self.start = self.kept.pop(0).id
