"""The aggregator's side of one expert: load, read, commit.

A commit is a compare-and-swap on `meta.commit`: it succeeds only on top of the loaded state, over the connection that
loaded it. Its MULTI holds only commands that cannot fail half way, and only aggregators may write the keys of the
expert's state.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import redis

from fedmoe.errors import DamagedExpertError, LostExpertError, ProtocolError, SpecError, StaleStateError
from fedmoe.protocol.condition import version_of
from fedmoe.protocol.exact import complete
from fedmoe.protocol.keys import GROUP
from fedmoe.protocol.layout import STAMPED_BYTES, stamp_of
from fedmoe.protocol.packed import packed_commit
from fedmoe.protocol.records import Entry, Meta, check_not_removed
from fedmoe.protocol.spec import PREAMBLE_BYTES, Spec
from fedmoe.protocol.tail import copied_keys
from fedmoe.protocol.weights_parts import WeightsParts
from fedmoe.store.chunks import places, put
from fedmoe.store.commit import Commit, Loaded
from fedmoe.store.connection import execute
from fedmoe.store.copies import Copies, readings
from fedmoe.store.full import NEARLY_FULL, is_full, memory_share, read_together, transact
from fedmoe.store.parts import File, NewWeights, part_keys, state_keys, weights_keys
from fedmoe.store.submissions import Submissions

# All aggregators read under one consumer name: the lease holder owns the whole pending list, and the list of dead
# consumers does not grow with each restart.
CONSUMER = "aggregator"
LOG_LENGTH = 100_000
DEAD_LENGTH = 10_000
BLOCKING_MS = 2**63  # no server clock reaches this; after the highest possible id a stream accepts no entry
_PAGE = 256
_TYPES = {"tail": b"hash", "decided": b"hash", "vectors": b"hash", "log": b"stream", "dead": b"stream"}
# The head in meta, the types of the other keys, the lengths of those that are strings, and the parts in meta.
_LOOK = """#!lua flags=no-writes
local types, lengths = {}, {}
for i = 2, #KEYS do
  types[i - 1] = redis.call('TYPE', KEYS[i]).ok
  lengths[i - 1] = types[i - 1] == 'string' and redis.call('STRLEN', KEYS[i]) or 0 end
return {redis.call('HGET', KEYS[1], 'commit'), types, lengths, redis.call('HGET', KEYS[1], 'parts')}"""
_GROUP = """#!lua flags=allow-oom
return redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')"""
_AT_ONCE = 1000  # keys or fields; a command in a script can have only a few thousand words

logger = logging.getLogger(__name__)


class ExpertStore(Submissions):
    """Redis commands of an aggregator for one expert.

    Every method raises RedisUnavailableError if Redis cannot be reached or refuses a command. After that error, and
    after StaleStateError, the caller must load the expert again.

    Attributes:
        was_full: Redis has refused a commit for memory, and the commit went beyond its limit.
    """

    was_full = False

    def spec(self) -> Spec:
        """The expert's spec.

        Raises:
            LostExpertError: if the expert is not in Redis.
            RemovedExpertError: if an operator removed it.
            DamagedExpertError: if only the spec is missing, or the spec cannot be read.
        """
        with self.connection.errors():
            text = self._redis.get(self.keys.spec)
        if text is None:  # or somebody writes the expert back now
            with self.connection.errors():
                text, meta = read_together(self._redis, ("get", self.keys.spec), ("hgetall", self.keys.meta))
        if text is None:
            check_not_removed(meta)
            if meta:
                raise DamagedExpertError(self.name, "its spec is missing")
            raise LostExpertError(self.name)
        try:
            return Spec.from_json(text)
        except ProtocolError:
            raise
        except SpecError as error:
            raise DamagedExpertError(self.name, f"its spec cannot be read ({error})") from error

    def is_unchanged(self, meta: Meta, *, n_decided: int) -> bool:
        """True if the expert has this meta and is whole: spec, weights, tail, decisions of `n_decided` workers."""
        keys, needs_state = self.keys, meta.tail.state == "snapshot"
        parts = weights_keys(keys, meta.parts) + (state_keys(keys, meta.parts) if needs_state else [])
        with self.connection.errors():
            head, n_there, n_workers, begin, tail, state, *n_parts = read_together(
                self._redis,
                ("hget", keys.meta, "commit"),
                ("exists", keys.meta, keys.spec),
                ("hlen", keys.decided),
                ("getrange", keys.weights, 0, STAMPED_BYTES - 1),
                ("hgetall", keys.tail),
                ("getrange", keys.server_state, 0, STAMPED_BYTES - 1),
                *([("exists", *parts)] if parts else []),
                wrong_type_is_none=True,
            )
        if parts and n_parts != [len(parts)]:
            return False
        if needs_state and stamp_of(state or b"") != meta.snapshot_commit:
            return False
        found = ((head or b"").decode(errors="replace"), n_there, n_workers, stamp_of(begin or b""))
        if found != (meta.commit, 2, n_decided, meta.snapshot_commit):
            return False
        with self.connection.errors():
            return Copies(self._redis, keys).n_stored(tail) >= meta.tail.fields

    def load(self) -> Loaded:
        """Read the expert as of one moment, then create the consumer group (from 0) if it is missing.

        The group is created only if the expert exists: without a group, a read from an emptied server fails and reveals
        the loss.

        Raises:
            LostExpertError: if the expert is gone.
            DamagedExpertError: if a part is missing or does not match meta.
            SpecError: if a key that commits write has the wrong type: an EXEC would fail half way.
        """
        keys = self.keys
        with self.connection.errors():
            for replies, copies in readings(
                self._redis,
                keys,
                ("get", keys.weights),
                ("get", keys.server_state),
                ("hgetall", keys.tail),
                ("hgetall", keys.meta),
                ("hgetall", keys.decided),
                ("hgetall", keys.vectors),
                ("get", keys.spec),
                ("getrange", keys.packed, 0, PREAMBLE_BYTES - 1),
                ("xrevrange", keys.log, "+", "-", 1),
                ("hgetall", keys.claims),
                *(("type", getattr(keys, name)) for name in _TYPES),
                wrong_type_is_none=True,
            ):
                weights, state, tail, meta, decided, vectors, spec, packed, last_line, claims, *types = (
                    replies
                )
                self._check_types(types, but=() if (meta or {}).get(b"tail") else ("tail",))
                if not (weights or meta or decided):
                    raise LostExpertError(self.name)
                condition, exact = complete(
                    spec,
                    meta or {},
                    decided or {},
                    weights=weights,
                    server_state=state,
                    tail=tail,
                    copies=copies,
                )
        if condition.meta is None or exact is None:
            raise DamagedExpertError(self.name, condition.damage)
        if exact.problem:
            logger.warning(
                "%s: %s: the server optimizer starts from zero with the next update; the weights are not affected",
                self.name, exact.problem,
            )  # fmt: skip
        self._make_group()
        return Loaded(
            meta=condition.meta,
            weights=exact.weights,
            decided=dict(condition.decided),
            vectors={_text(worker): _text(record) for worker, record in (vectors or {}).items()},
            generation=self.connection.generation,
            packed_commit=packed_commit(packed or b""),
            logged_version=version_of(last_line),
            claims={who.decode(): int(version) for who, version in (claims or {}).items()},
            server_state=exact.server_state,
        )

    def _make_group(self) -> None:
        with self.connection.errors():
            try:
                self._redis.xgroup_create(self.keys.updates, GROUP, id="0", mkstream=True)
            except redis.ResponseError as error:
                if is_full(error):
                    self._make_group_if_full()
                elif "BUSYGROUP" not in str(error):
                    raise

    def _make_group_if_full(self) -> None:
        try:
            self._redis.eval(_GROUP, 1, self.keys.updates, GROUP)
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def _check_types(self, types: Sequence[bytes], *, but: Sequence[str] = ()) -> None:
        """Raise SpecError if a key of _TYPES has the wrong type: only its command in an EXEC would fail.

        The keys named in `but` may have any type: nothing is read from them, and a commit removes them first.
        """
        for (name, wanted), kind in zip(_TYPES.items(), types, strict=True):
            if name not in but and kind not in (wanted, b"none"):
                raise SpecError(
                    f"the key {getattr(self.keys, name)} is a {kind.decode()} and should be a {wanted.decode()}: "
                    "another program overwrote it, rename the key",
                    about=name,
                )

    def reclaim(self) -> list[Entry]:
        """Claim all entries that any aggregator has read but not committed."""
        entries, start = [], "0-0"
        with self.connection.errors():
            while True:
                start, page, *_ = self._redis.xautoclaim(
                    self.keys.updates, GROUP, CONSUMER, min_idle_time=0, start_id=start, count=_PAGE
                )
                entries += [Entry.of(*item) for item in page]
                if start in (b"0-0", "0-0"):
                    return entries

    def read(self, *, block_ms: int | None, count: int) -> list[Entry]:
        """Entries that nobody has read yet; waits up to block_ms for the first one, None: does not wait."""
        with self.connection.errors():
            reply = self._redis.xreadgroup(
                GROUP, CONSUMER, {self.keys.updates: ">"}, count=count, block=block_ms
            )
        return [Entry.of(*item) for _, page in reply or () for item in page]

    def is_nearly_full(self) -> bool:
        """True if Redis has less than a tenth of its memory left."""
        with self.connection.errors():
            return memory_share(self._redis) > NEARLY_FULL

    def mend(self) -> bool:
        """Repair a stream blocked by an XADD with the highest possible id; True if it was repaired.

        An empty blocked stream is deleted and created again with its group; a stream with entries is left alone.
        """
        with self.connection.errors(), self._redis.pipeline(transaction=True) as pipe:
            pipe.watch(self.keys.updates)
            info = pipe.xinfo_stream(self.keys.updates)
            newest = Entry(info["last-generated-id"].decode(), {})
            if info["length"] or newest.ms < BLOCKING_MS:
                return False
            pipe.multi()
            pipe.delete(self.keys.updates)
            pipe.xgroup_create(self.keys.updates, GROUP, id="0", mkstream=True)
            return execute(pipe) is not None

    def commit(self, commit: Commit) -> None:
        """Make a batch part of the expert, atomically.

        Raises StaleStateError if the expert's head is not `commit.on`, or the connection was reopened.
        """
        with self.connection.errors(), self._redis.pipeline() as pipe, self._snapshot(commit) as snapshot:
            present = self.check_head(pipe, commit, snapshot)
            pipe.multi()
            self.queue(pipe, commit, snapshot, present)
            try:
                done = execute(pipe) is not None
            except redis.RedisError as error:
                if not is_full(error):
                    raise
                done = self._commit_to_full(pipe, commit, snapshot)
                self.was_full = True
            if not done:
                raise self._overtaken()

    def _snapshot(self, commit: Commit) -> AbstractContextManager[NewWeights]:
        """The weights that a commit writes; before it writes parts of them, it makes sure that it may be in time."""
        if commit.written is not None:
            return nullcontext(commit.written)
        parts, writes = commit.meta.parts, commit.weights is not None
        if parts and writes and self._redis.hget(self.keys.meta, "commit") != commit.on.encode():
            raise self._overtaken()
        return self.new_weights(parts, commit.weights, commit.server_state, copies=commit.copies)

    def new_weights(
        self,
        parts: WeightsParts,
        weights: File | None,
        server_state: File | None,
        *,
        copies: Sequence[str] = (),
    ) -> NewWeights:
        """The strings of new weights for a commit; their parts are written now, also to a full Redis."""
        with self.connection.errors():
            return NewWeights(
                self._redis, self.keys, parts, weights, server_state, copies=copies, though_full=True
            )

    def _overtaken(self) -> StaleStateError:
        return StaleStateError(f"{self.name}: another process committed meanwhile", about="commit")

    def _large(self, commit: Commit, snapshot: NewWeights) -> dict[str, memoryview | bytes | None]:
        """The values of a commit that may be large, by key; None for one that does not change."""
        return {**snapshot.strings, self.keys.packed: commit.packed}

    def check_head(self, pipe: Any, commit: Commit, snapshot: NewWeights) -> dict[str, int]:
        """WATCH the keys of a commit, check head and types; returns key -> bytes of values it can write in place."""
        keys = self.keys
        large = self._large(commit, snapshot)
        found = places(self._redis, large)
        written = (keys.meta, *(getattr(keys, name) for name in _TYPES), *large)
        pipe.watch(*written, *snapshot.watched)
        snapshot.check(pipe, self.name)
        head, types, lengths, parts = pipe.eval(_LOOK, len(written), *written)
        if head is None or head != commit.on.encode():
            raise self._overtaken()
        is_new_tail = commit.weights is not None or commit.begins_tail
        self._check_types(types[: len(_TYPES)], but=("tail",) if is_new_tail else ())
        if self.connection.generation != commit.generation:
            raise StaleStateError(
                f"{self.name}: the connection to Redis was opened again", about="connection"
            )
        snapshot.replaced = []
        if commit.weights is not None:
            snapshot.replaced += part_keys(keys, WeightsParts.in_meta({b"parts": parts or b""}))
        if is_new_tail and types[0] == b"hash":
            snapshot.replaced += copied_keys(keys, pipe.hgetall(keys.tail))
        now = dict(zip(written[1:], lengths, strict=True))
        return {key: length for key, length in found.items() if length == now[key]}

    def _commit_to_full(self, pipe: Any, commit: Commit, snapshot: NewWeights) -> bool:
        """Repeat a commit that a full Redis has refused: it frees the memory of the decided updates."""
        logger.warning("%s: Redis is full: committing beyond its limit to free memory", self.name)
        present = self.check_head(pipe, commit, snapshot)
        queued = self._redis.pipeline(transaction=True)
        self.queue(queued, commit, snapshot, present)
        commands = [words for words, _ in queued.command_stack]
        return transact(
            pipe, self.keys.meta, commit.on, commands, needed=snapshot.watched, removed=snapshot.replaced
        )

    def queue(self, pipe: Any, commit: Commit, snapshot: NewWeights, present: Mapping[str, int]) -> None:
        """Queue the commands of a commit."""
        keys = self.keys
        for key, value in self._large(commit, snapshot).items():
            if value is not None:
                put(pipe, key, value, present.get(key, 0))
        snapshot.queue(pipe)
        if commit.weights is not None or commit.begins_tail:
            pipe.unlink(keys.tail)
        fields = list(commit.tail.items())
        for first in range(0, len(fields), _AT_ONCE):
            pipe.hset(keys.tail, mapping=dict(fields[first : first + _AT_ONCE]))
        meta, before = commit.meta, commit.before
        pipe.hset(keys.meta, mapping=meta.changes(before) if before else meta.to_hash())
        if commit.decided:
            pipe.hset(keys.decided, mapping={worker: d.to_json() for worker, d in commit.decided.items()})
        if kept := {worker: text for worker, text in commit.vectors.items() if text}:
            pipe.hset(keys.vectors, mapping=kept)
        if withheld := commit.vectors.keys() - kept.keys():
            pipe.hdel(keys.vectors, *sorted(withheld))
        for line in commit.log:
            pipe.xadd(keys.log, dict(line), maxlen=LOG_LENGTH, approximate=True)
        for line in commit.dead:
            pipe.xadd(keys.dead, dict(line), maxlen=DEAD_LENGTH, approximate=True)
        if commit.entries:
            pipe.xack(keys.updates, GROUP, *commit.entries)
            pipe.xdel(keys.updates, *commit.entries)
        for first in range(0, len(commit.unlink), _AT_ONCE):
            pipe.unlink(*commit.unlink[first : first + _AT_ONCE])


def _text(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")
