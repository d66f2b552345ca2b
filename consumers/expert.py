"""One expert as an aggregator retains it: decide a batch of entries, fold updates, and commit.

After any error or refused commit, the retained state is that of the last load or commit, and Redis may have another
state: load again.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

import torch

from consumers.applied import letter_of, letter_of_garbage, line_of, meta_after, tell_applied, tell_clamped
from consumers.decide import Admission, Outcome, Verdict, counts_of, judge_header
from consumers.early_warning import Judged, judge, reason_to_hold
from consumers.held import Held
from consumers.history import History
from consumers.kept import keep
from consumers.packer import Packer
from consumers.payload import Workspace, fold_payload, keeping
from consumers.settled import Settled
from fedmoe.errors import StaleStateError, UpdateError
from fedmoe.protocol import records
from fedmoe.protocol.balance import peers_of
from fedmoe.protocol.beat import protocol_problem
from fedmoe.protocol.codec import scratch_values
from fedmoe.protocol.doorbell import Doorbell, Garbage, Join, parse_entry
from fedmoe.protocol.exact import digests_of
from fedmoe.protocol.features import features_text
from fedmoe.protocol.formats import EXACT
from fedmoe.protocol.growth import Growth
from fedmoe.protocol.identity import BEAT_FIELDS, BaseIdentity
from fedmoe.protocol.integrity import restamp
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.lines import RulesLine
from fedmoe.protocol.records import Decided, Entry, Meta
from fedmoe.protocol.rules import MAX_REASON_CHARS
from fedmoe.protocol.server import has_state
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import ForeignHeaderError, Header
from fedmoe.protocol.vectors import stored_text
from fedmoe.store.archive import Archive
from fedmoe.store.commit import Commit, Loaded
from fedmoe.store.expert import ExpertStore
from fedmoe.store.lifecycle import new_id
from fedmoe.util.software import software
from fedmoe.util.threads import ALONE, Threads

logger = logging.getLogger(__name__)

More = Callable[[], Sequence[Entry]]
MOST_WARNINGS = 256  # of `warn_once`; a bound, because entries may use any number of worker names
HEADERS_AT_ONCE = 16  # each header may take 256 KiB


class Expert:
    """The retained state of one expert: the loaded state plus the updates folded since.

    Args:
        store: of this expert.
        spec: of this expert.
        aggregator: name of this process, for people.
        archive: keeps applied updates; None: they are not kept.
        history: the commits that this state passed through; a new one by default.
        before_each: called before each entry is decided.
        clock: seconds since 1970, for people only.
        threads: fold and pack what is large.
    """

    def __init__(
        self,
        store: ExpertStore,
        spec: Spec,
        *,
        aggregator: str,
        archive: Archive | None = None,
        history: History | None = None,
        before_each: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
        threads: Threads = ALONE,
    ) -> None:
        self.store = store
        self.spec = spec
        self._aggregator = aggregator
        self.archive = archive
        self.history = history or History()
        self.before_each = before_each
        self._clock = clock
        self._threads = threads
        # Values of the last load or commit, and the newest values: the same object until an update is folded.
        self.held = self._folded = Held(spec.layout)
        self.settled = Settled()  # for other threads
        # Targets of the next folds; the second spare takes memory only once a batch applies more than one update.
        self._spares = [Held(spec.layout), Held(spec.layout)]
        self._scratch = torch.empty(scratch_values(spec.layout.numel))
        self._packer = Packer(spec, threads)
        self.warned: set[str] = set()
        self.writes_weights = False  # in each commit, because the expert may have no tail
        self.copies_refused: Exception | None = None  # why Redis did not copy an update for the tail

    @property
    def buffer(self) -> AdapterBuffer:
        """The weights of the last load or commit."""
        return self.held.weights

    def load(self) -> Loaded:
        """Load the state from Redis. Raises like ExpertStore.load; SpecError if the weights do not fit the spec."""
        loaded: Loaded = self.store.load()
        if loaded.meta.spec != self.spec.digest:
            raise StaleStateError(f"{self.store.name}: it was created again, with another spec", about="spec")
        self.settled.name("", None)
        self.held.load(loaded.weights, loaded.server_state, loaded.server_optimizer)
        self.settled.name(loaded.meta.weights_commit, self.held)
        self._folded = self.held
        self.meta = loaded.meta
        self.decided = loaded.decided
        self.vectors = loaded.vectors
        self.generation = loaded.generation
        self.history.arrive(self.meta.commit)
        return loaded

    @property
    def is_held(self) -> bool:
        """True if the rules in force say that no update is applied."""
        return bool(self.meta.rules.held)

    @property
    def is_behind(self) -> bool:
        """True if meta does not name this aggregator's protocol and features yet; the next commit writes them."""
        return self.meta.protocol < records.PROTOCOL or self.meta.knows != features_text()

    def next_meta(self, *, new_weights: bool = False) -> Meta:
        """The present meta under a new commit id, which also becomes the weights commit if `new_weights`."""
        commit, now, held = new_id(), self.meta, self._folded
        return replace(
            now,
            commit=commit,
            weights_commit=commit if new_weights else now.weights_commit,
            digests=digests_of(commit, held.weights.file, held.state_file) if new_weights else now.digests,
            server_state=held.optimizer if new_weights else now.server_state,
            updated_at=self._clock(),
            aggregator=self._aggregator,
            protocol=records.PROTOCOL,
            software=software(),
            knows=features_text(),
        )

    def send(self, commit: Commit, meta: Meta) -> None:
        """Commit, with `meta` as the new meta. Raises like ExpertStore.commit."""
        commit.meta = meta
        self.history.attempt(meta.commit, commit.log, commit.dead)
        self.store.commit(commit)
        self.meta = meta
        self.history.arrive(meta.commit)

    def process(self, entries: Sequence[Entry], *, more: More = lambda: ()) -> list[Verdict]:
        """Decide entries in stream order and commit them in one transaction.

        Once an update is folded, `more` is called for new entries until it returns none: on an idle stream an update is
        committed at once, and under load many updates share one write. Once the expert is held, entries are left as
        they are: pending, to be claimed after its release. After a failure the retained state is the one before the
        call: a state that Redis has had, which may be written back.
        """
        before = self.meta, dict(self.decided), dict(self.vectors)
        try:
            verdicts = self._process(entries, more)
        except BaseException:
            self._revert(*before)
            raise
        if self._folded is not self.held:
            self.settled.name(self.meta.weights_commit, self._folded)
            self._spares.append(self.held)
            self.held = self._folded
        return verdicts

    def _revert(self, meta: Meta, decided: dict[str, Decided], vectors: dict[str, str]) -> None:
        if self._folded is not self.held:
            self._spares.append(self._folded)
        self.meta, self.decided, self.vectors, self._folded = meta, decided, vectors, self.held

    def _process(self, entries: Sequence[Entry], more: More) -> list[Verdict]:
        commit = Commit.on_top(self.meta, self.generation)
        self._growth = Growth(self.meta, self.spec, is_wanted=not self.writes_weights)
        verdicts: list[Verdict] = []
        with self.store.removed_after_failure(self._growth.made):
            while entries and not self.is_held:
                verdicts += self._decide_all(entries, commit)
                entries = more() if self._folded is not self.held and not self.is_held else ()
        if commit.entries or self.is_behind:
            self.commit(commit)
        return verdicts

    def _decide_all(self, entries: Sequence[Entry], commit: Commit) -> list[Verdict]:
        verdicts: list[Verdict] = []
        for first in range(0, len(entries), HEADERS_AT_ONCE):
            some = [(entry, parse_entry(entry)) for entry in entries[first : first + HEADERS_AT_ONCE]]
            bells = [bell for _, bell in some if isinstance(bell, Doorbell)]
            headers = dict(zip(bells, self.store.headers([bell.update for bell in bells]), strict=True))
            for entry, announced in some:
                if self.is_held:
                    return verdicts
                self.before_each()
                commit.entries.append(entry.id)
                match announced:
                    case Garbage(reason=reason):
                        self._garbage(entry, reason, commit)
                    case Join(worker=worker):
                        beat = self.store.heartbeat(worker, ("protocol", *BEAT_FIELDS))
                        if problem := protocol_problem(worker, beat.protocol):
                            self.warn_once(problem)
                        else:
                            self._pin(BaseIdentity.from_beat(beat), worker)
                    case Doorbell() as bell:
                        if verdict := self.decide(bell, headers[bell], entry, commit):
                            verdicts.append(verdict)
        return verdicts

    def commit(self, commit: Commit) -> None:
        """Write all that was decided, in one transaction on top of the loaded state; StaleStateError if it moved."""
        is_new = self._folded is not self.held
        meta = self.next_meta(new_weights=is_new)
        commit.add_to_tail(self._growth, self.store.keys)
        if is_new:
            self._folded.stamp(meta.commit)
            if self.spec.wire_format != EXACT:
                commit.packed = self._packer.pack(self._folded.weights.flat, meta.commit)
            grows = self._growth.is_open
            meta = meta.with_tail(self._growth.tail) if grows else self.write_weights(commit, meta)
        self.send(commit, meta)
        tell_applied(self.store.name, commit.log)

    def write_weights(self, commit: Commit, meta: Meta) -> Meta:
        """Have a commit write the weights, and the server state, and remove the tail; returns its meta."""
        commit.weights, commit.server_state = self._folded.weights.file, self._folded.state_file
        # It may be there, of an optimizer that is not in force any more.
        if commit.server_state is None and (self.meta.server_state or self.meta.tail):
            commit.unlink.append(self.store.keys.server_state)
        return meta.with_snapshot(commit.weights)

    def decide(self, bell: Doorbell, raw: bytes, entry: Entry, commit: Commit) -> Verdict | None:
        """Decide one entry, whose header is `raw`, and note it in the commit; None if the header is garbage."""
        if not raw:
            return self._undecidable(bell, Verdict(Outcome.UNDECIDABLE, "its header is missing"))
        try:
            header = Header.unpack(raw)
            if (header.run, header.seq) != (bell.run, bell.seq):
                raise UpdateError("the header is that of another update", about="id")
        except ForeignHeaderError as error:
            self.warn_once(f"updates of worker {bell.worker} cannot be read: {error}")
            self.meta = replace(self.meta, undecidable=self.meta.undecidable + 1)
            return Verdict(Outcome.UNDECIDABLE, str(error))
        except UpdateError as error:
            self._garbage(entry, str(error), commit)
            return None
        head = self.decided.get(bell.worker)
        peers = peers_of(
            self.store.name, bell.worker, self.decided, self.meta.version, self.meta.rules.aggregation
        )
        judged = judge_header(header, head, self.meta, self.spec, peers)
        verdict, kept = (
            self._fold_payload(bell, header, judged) if isinstance(judged, Admission) else (judged, "")
        )
        match verdict.outcome:
            case Outcome.DUPLICATE:
                self.meta = replace(self.meta, duplicate=self.meta.duplicate + 1)
                commit.unlink += self.store.payload_keys(bell.worker, bell.run, bell.seq, len(header.parts))
                return verdict
            case Outcome.UNDECIDABLE:
                head = self.decided.get(bell.worker)
                if head and header.run == head.id.run and header.seq < head.id.seq:  # it can never be decided
                    commit.unlink += self.store.payload_keys(*bell.update, len(header.parts))
                return self._undecidable(bell, verdict)
            case Outcome.REFUSED:
                self._refuse(bell.worker, header, verdict, commit)
                judged_loss = Judged(curve=head.validation if head else "")
            case Outcome.APPLIED:
                judged_loss = judge(header, head, self.meta.version, self.meta.rules, self.meta.rolled_back)
                self._apply(bell.worker, header, verdict, kept, judged_loss, commit)
        decided = Decided(
            id=header.id,
            how=verdict.outcome.value,
            version=self.meta.version,
            staleness=verdict.staleness,
            reason=verdict.reason,
            position=header.position,
            validation=judged_loss.curve,
        )
        stamp = restamp(self.meta.decided_stamp, bell.worker, self.decided.get(bell.worker), decided)
        self.meta = replace(self.meta, decided_stamp=stamp)
        self.decided[bell.worker] = commit.decided[bell.worker] = decided
        commit.unlink += self.store.payload_keys(bell.worker, bell.run, bell.seq, len(header.parts))
        self._hold_if_worse(bell.worker, judged_loss, commit)
        return verdict

    def _hold_if_worse(self, worker: str, judged: Judged, commit: Commit) -> None:
        """Warn if the worker's validation loss got worse; hold the expert if the rules say so and workers agree."""
        if judged.odd:
            self.warn_once(f"worker {worker} claims {judged.odd}; it is left out, and the update counts")
        if judged.got_worse:
            logger.warning(
                "%s: the validation loss of worker %s is worse: %s", self.store.name, worker, judged.got_worse
            )
        rules = self.meta.rules
        if why := reason_to_hold(self.decided, self.meta.version, rules, self.meta.rolled_back):
            after = rules.hold(why[:MAX_REASON_CHARS])
            line = RulesLine(version=self.meta.version, changed=rules.differences(after), ended=rules)
            commit.log.append(line.to_fields())
            self.meta = replace(self.meta, rules=after)
            logger.warning(
                "%s is held at version %d, and updates wait: %s (fedmoe expert release %s)",
                self.store.name, self.meta.version, why, self.store.name,
            )  # fmt: skip

    def _fold_payload(self, bell: Doorbell, header: Header, admission: Admission) -> tuple[Verdict, str]:
        """Fold a payload and judge it; returns the verdict, and the digest of the kept update ("" if it was not kept).

        Parts are folded as they arrive, into a spare buffer; unless the update is applied, that buffer is discarded.
        What may go into the tail is copied within Redis first, and folded from the copy.
        """
        out, rules = self._spares[-1], self.meta.rules.aggregation
        space = Workspace(self._folded.next_values(out, rules), out.values, self._scratch, self._threads)
        parts: list[bytes] = []
        copy = self._growth.copy(new_id(), len(header.parts))
        with closing(self.store.parts(*bell.update, header.parts, copy)) as stream:
            read = keeping(stream, parts) if self.archive is not None else stream
            verdict = fold_payload(header, admission, copy.reading(read) if copy else read, self.spec, space)
        if copy and copy.refused:
            self.copies_refused, self.writes_weights = copy.refused, True
        if verdict.outcome is not Outcome.APPLIED:
            return verdict, ""
        kept = keep(self.archive, header, parts) if self.archive is not None else ""
        verdict = replace(verdict, new_state=self._folded.lacks_state(rules))
        self._growth.add(
            self.meta.version + 1, admission.step, copy,
            rules=self.meta.rules.number, new_state=verdict.new_state,
        )  # fmt: skip
        out.optimizer = rules.server_optimizer if has_state(rules) else ""
        self._spares.pop()
        if self._folded is not self.held:
            self._spares.append(self._folded)
        self._folded = out
        return verdict, kept

    def _apply(
        self, worker: str, header: Header, verdict: Verdict, kept: str, judged: Judged, commit: Commit
    ) -> None:
        counts = counts_of(header, self.meta.rules.training)
        self.meta = meta_after(self.meta, header, verdict, counts)
        self._pin(BaseIdentity.from_header(header), worker)
        line = line_of(worker, self.meta, header, verdict, counts, measured=judged.measured, kept=kept)
        tell_clamped(self.store.name, worker, header, counts)
        commit.log.append(line.to_fields())
        self._take_vector(worker, header, commit)

    def _take_vector(self, worker: str, header: Header, commit: Commit) -> None:
        """Take over the domain vector that an applied update carries; leave it out if it cannot be used."""
        try:
            text = stored_text(header, self.spec)
        except UpdateError as error:
            self.warn_once(
                f"the domain vector of worker {worker} is left out, its update is applied: {error}"
            )
            return
        if text is not None:
            commit.vectors[worker] = self.vectors[worker] = text
        if text == "":
            del self.vectors[worker]

    def _refuse(self, worker: str, header: Header, verdict: Verdict, commit: Commit) -> None:
        self.meta = replace(self.meta, refused=self.meta.refused + 1)
        commit.dead.append(letter_of(worker, header, verdict.reason).to_fields())
        logger.warning("%s refused %s seq %d: %s", self.store.name, worker, header.seq, verdict.reason)

    def _undecidable(self, bell: Doorbell, verdict: Verdict) -> Verdict:
        self.meta = replace(self.meta, undecidable=self.meta.undecidable + 1)
        logger.warning(
            "%s cannot decide %s seq %d: %s; its worker resends it if it is still needed",
            self.store.name, bell.worker, bell.seq, verdict.reason,
        )  # fmt: skip
        return verdict

    def _garbage(self, entry: Entry, reason: str, commit: Commit) -> None:
        self.meta = replace(self.meta, garbage=self.meta.garbage + 1)
        letter = letter_of_garbage(entry, reason)
        commit.dead.append(letter.to_fields())
        logger.warning(
            "%s removed garbage from its stream (%s): %s", self.store.name, reason, letter.fields[:200]
        )

    def warn_once(self, text: str) -> None:
        """Log a warning about a worker's unreadable records, but each text only once."""
        if text not in self.warned and len(self.warned) < MOST_WARNINGS:
            self.warned.add(text)
            logger.warning("%s: %s", self.store.name, text)

    def _pin(self, identity: BaseIdentity, worker: str) -> None:  # pins only unpinned components
        self.meta = identity.pin(self.meta, f"worker {worker}")
