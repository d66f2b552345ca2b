"""A whole expert: create it, inspect what is left of it, write it back.

Each write is one compare-and-swap: it succeeds only on top of the inspected state.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import redis

from fedmoe.protocol.condition import Condition, examine
from fedmoe.protocol.doorbell import Doorbell
from fedmoe.protocol.exact import complete
from fedmoe.protocol.features import check_requires
from fedmoe.protocol.layout import STAMPED_BYTES, stamped
from fedmoe.protocol.lines import Line
from fedmoe.protocol.packed import pack_file
from fedmoe.protocol.records import Decided, Meta, read_protocol
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import PAYLOAD_TTL_S, Header
from fedmoe.store.connection import Connection, execute
from fedmoe.store.copies import readings
from fedmoe.store.full import is_full, transact
from fedmoe.store.parts import NewWeights, stray_parts

CLAIM_MS = 10_000  # all claims to write an expert back expire together, so those of dead aggregators do too
_CLAIM = """#!lua flags=allow-oom
local is_new = redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3], 'NX')
return {is_new, redis.call('HGETALL', KEYS[1])}"""


def new_id() -> str:
    """A random id of a commit or a lineage."""
    return secrets.token_hex(8)


class ExpertLifecycle:
    """Redis commands that create an expert and write it back; `ExpertStore` adds those that serve it.

    Every method may raise RedisUnavailableError.
    """

    def __init__(self, connection: Connection, name: str) -> None:
        self.name = name
        self.keys = connection.keys.expert(name)
        self.connection = connection.at(self.keys.meta)
        self._redis = self.connection.client

    def exists(self) -> bool:
        """True if the expert was created."""
        with self.connection.errors():
            return bool(self._redis.exists(self.keys.meta))

    def check_protocol(self) -> None:
        """Raise ProtocolError if the expert has a later protocol, or needs a feature that this FedMoE does not know."""
        with self.connection.errors():
            protocol = self._redis.hget(self.keys.meta, "protocol")
            requires = self._redis.hget(self.keys.meta, "requires")
        read_protocol(protocol)
        check_requires((requires or b"").decode(errors="replace"), f"expert {self.name!r}")

    def condition(self) -> Condition:
        """What is left of the expert, read atomically."""
        keys = self.keys
        with self.connection.errors():
            for replies, copies in readings(
                self._redis, keys,
                ("get", keys.spec), ("getrange", keys.weights, 0, STAMPED_BYTES - 1), ("hgetall", keys.meta),
                ("hgetall", keys.decided), ("strlen", keys.weights), ("xrevrange", keys.log, "+", "-", 1),
                ("hgetall", keys.tail),
                wrong_type_is_none=True,
            ):  # fmt: skip
                spec, weights, meta, decided, length, last_line, tail = replies
                tail_fields = copies.n_stored(tail)
        return examine(
            spec, weights, meta or {}, decided or {},
            weights_bytes=length or 0, last_line=last_line or (), tail_fields=tail_fields,
        )  # fmt: skip

    def whole_condition(self) -> Condition:
        """Like `condition`, with all values read: it also finds those that differ from meta's digests."""
        keys = self.keys
        with self.connection.errors():
            for replies, copies in readings(
                self._redis, keys,
                ("get", keys.spec), ("get", keys.weights), ("hgetall", keys.meta), ("hgetall", keys.decided),
                ("xrevrange", keys.log, "+", "-", 1), ("get", keys.server_state), ("hgetall", keys.tail),
                wrong_type_is_none=True,
            ):  # fmt: skip
                spec, weights, meta, decided, last_line, state, tail = replies
                found, _ = complete(
                    spec, meta or {}, decided or {},
                    weights=weights, server_state=state, tail=tail, copies=copies, last_line=last_line or (),
                )  # fmt: skip
        return found

    def claim(self, holder: str, version: int) -> tuple[bool, str]:
        """Tell all aggregators that this one can write back a version that Redis has lost.

        Returns whether this holder had no claim yet, and the aggregator that claims the newest version. All claims
        expire together 10 s after the first.
        """
        key = self.keys.claims
        with self.connection.errors(), self._redis.pipeline(transaction=True) as pipe:
            try:
                pipe.hset(key, holder, version)
                pipe.pexpire(key, CLAIM_MS, nx=True)
                pipe.hgetall(key)
                is_new, _, claims = pipe.execute()
            except redis.RedisError as error:
                if not is_full(error):
                    raise
                is_new, pairs = self._redis.eval(_CLAIM, 1, key, holder, version, CLAIM_MS)
                claims = dict(zip(pairs[::2], pairs[1::2], strict=True))
        return bool(is_new), max(claims, key=lambda name: (int(claims[name]), name)).decode()

    def is_claimed(self) -> bool:
        """True if an aggregator is about to write back a retained state that Redis has lost."""
        with self.connection.errors():
            return bool(self._redis.exists(self.keys.claims))

    def lost(self) -> dict[str, str]:
        """The workers that knew this expert when it was found lost: worker -> lineage; empty if it was not."""
        with self.connection.errors():
            raw = self._redis.hgetall(self.keys.lost)
        return {worker.decode(): lineage.decode() for worker, lineage in raw.items()}

    def mark_lost(self, known: Mapping[str, str]) -> None:
        """Record that the expert was lost and not created again, for aggregators that start after these workers end."""
        with self.connection.errors():
            self._redis.hset(self.keys.lost, mapping=dict(known))

    def create(
        self,
        spec: Spec,
        meta: Meta,
        weights: memoryview,
        *,
        gateway_weight: float | None = None,
        though_removed: bool = False,
    ) -> bool:
        """Write a new expert atomically; False if any part of one exists already.

        With a `gateway_weight` it is added to the federation's list. An expert that an operator removed counts as
        existing, unless `though_removed`.
        """
        keys = self.keys
        parts = (keys.meta, keys.weights, keys.decided)
        packed = pack_file(weights, spec, meta.weights_commit)
        meta, weights = meta.with_snapshot(weights), memoryview(stamped(weights, meta.weights_commit))
        with self.connection.errors():
            snapshot = NewWeights(self._redis, keys, meta.parts, weights, None)
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.watch(*parts, *snapshot.watched)
                snapshot.check(pipe, self.name)
                if pipe.exists(*parts) and not (though_removed and pipe.hget(keys.meta, "removed")):
                    return False
                snapshot.replaced = list(stray_parts(self._redis, keys, but=meta.parts))
                pipe.multi()
                if though_removed:
                    pipe.unlink(keys.meta)
                pipe.unlink(  # of an earlier history
                    keys.log,
                    keys.dead,
                    keys.vectors,
                    keys.packed,
                    keys.server_state,
                    keys.tail,
                    keys.lost,
                    keys.claims,
                )
                self._queue_parts(pipe, spec, meta, snapshot, packed)
                if execute(pipe) is None:
                    return False
            if gateway_weight is not None:
                self.register(gateway_weight)
            return True

    def write_back(
        self,
        spec: Spec,
        meta: Meta,
        weights: memoryview,
        *,
        on: str,
        decided: Mapping[str, Decided],
        vectors: Mapping[str, str],
        server_state: memoryview | None = None,
        log: Sequence[Line] = (),
        dead: Sequence[Line] = (),
    ) -> bool:
        """Atomically replace what is left of an expert with an aggregator's retained state.

        Args:
            spec: of the expert.
            meta: of the retained state.
            weights: stamped with meta's `weights_commit`.
            on: the expected commit in Redis, "" if there is no meta; the result is False if it is another one.
            decided: the last decided update of each worker.
            vectors: the domain vector of each worker, as stored.
            server_state: stamped like the weights; None if there is none.
            log: lines that Redis lost; they are appended.
            dead: dead letters that Redis lost; they are appended.
        """
        keys = self.keys
        packed = pack_file(weights, spec, meta.weights_commit)
        with self.connection.errors(), self._redis.pipeline(transaction=True) as pipe:
            snapshot = NewWeights(self._redis, keys, meta.parts, weights, server_state, though_full=True)
            if (wrong := self._watch(pipe, on, *snapshot.watched)) is None:
                return False
            snapshot.check(pipe, self.name)
            snapshot.replaced = list(stray_parts(self._redis, keys, but=meta.parts))
            raised = self._raised_incarnations(pipe, decided)

            def queue(pipe: Any) -> None:
                pipe.unlink(
                    *wrong,
                    keys.meta,
                    keys.spec,
                    keys.weights,
                    keys.decided,
                    keys.vectors,
                    keys.packed,
                    keys.server_state,
                    keys.tail,
                    keys.lost,
                    keys.claims,
                )
                self._queue_parts(pipe, spec, meta, snapshot, packed)
                if decided:
                    pipe.hset(keys.decided, mapping={w: d.to_json() for w, d in decided.items()})
                if vectors:
                    pipe.hset(keys.vectors, mapping=dict(vectors))
                for key, lines in ((keys.log, log), (keys.dead, dead)):
                    for line in lines:
                        pipe.xadd(key, dict(line))
                for worker, incarnation in raised.items():
                    pipe.set(keys.incarnation(worker), incarnation, ex=PAYLOAD_TTL_S)

            pipe.multi()
            queue(pipe)
            try:
                return execute(pipe) is not None
            except redis.RedisError as error:
                if not is_full(error) or self._watch(pipe, on, *snapshot.watched) is None:
                    raise
            snapshot.check(pipe, self.name)
            queued = self._redis.pipeline(transaction=True)
            queue(queued)
            commands = [words for words, _ in queued.command_stack]
            return transact(pipe, keys.meta, on, commands, needed=snapshot.watched, removed=snapshot.replaced)

    def _watch(self, pipe: Any, on: str, *more: str) -> list[str] | None:
        """WATCH keys, with those to replace; None unless the commit is `on`, else wrong types of log and dead keys."""
        keys = self.keys
        pipe.watch(keys.meta, keys.log, keys.dead, *more)
        present = pipe.hget(keys.meta, "commit") if pipe.type(keys.meta) == b"hash" else None
        if (present.decode(errors="backslashreplace") if present else "") != on:
            return None
        return [key for key in (keys.log, keys.dead) if pipe.type(key) not in (b"stream", b"none")]

    def _raised_incarnations(self, pipe: Any, decided: Mapping[str, Decided]) -> dict[str, int]:
        """Incarnation counters that Redis lost, with their values: a worker's next run needs a new incarnation."""
        if not decided:
            return {}
        counts = pipe.mget([self.keys.incarnation(worker) for worker in decided])
        wanted = {worker: last.id.incarnation for worker, last in decided.items()}
        return {
            worker: incarnation
            for (worker, incarnation), count in zip(wanted.items(), counts, strict=True)
            if not (count or b"").isdigit() or int(count) < incarnation
        }

    def _queue_parts(
        self, pipe: Any, spec: Spec, meta: Meta, snapshot: NewWeights, packed: bytes | None
    ) -> None:
        keys = self.keys
        pipe.set(keys.spec, spec.to_json())
        for key, value in snapshot.strings.items():
            if value is not None:
                pipe.set(key, value)
        snapshot.queue(pipe)
        pipe.hset(keys.meta, mapping=meta.to_hash())
        if packed:
            pipe.set(keys.packed, packed)

    def announce(self, worker: str, header: Header, parts: Sequence[bytes]) -> bool:
        """Resend an update on behalf of its worker: parts, header and entry; False if Redis is full."""
        keys, (run, seq) = self.keys, header.id
        with self.connection.errors(), self._redis.pipeline(transaction=False) as pipe:
            for index, part in enumerate(parts):
                pipe.set(keys.part(worker, run, seq, index), part, ex=PAYLOAD_TTL_S)
            pipe.set(keys.header(worker, run, seq), header.pack(), ex=PAYLOAD_TTL_S)
            pipe.xadd(keys.updates, Doorbell.of(header, worker).to_fields())
            try:
                pipe.execute()
            except redis.RedisError as error:
                if not is_full(error):
                    raise
                self._redis.unlink(
                    keys.header(worker, run, seq),
                    *(keys.part(worker, run, seq, i) for i in range(len(parts))),
                )
                return False
        return True

    def register(self, gateway_weight: float, *, overwrite: bool = False) -> None:
        """Add the expert to the federation's list; a listed expert keeps its weight unless `overwrite`."""
        key, weight = self.connection.keys.experts, f"{gateway_weight:g}"
        there = self.connection.at(key)
        with there.errors():
            listed = there.client.hget(key, self.name)
            if listed is None or (overwrite and listed.decode() != weight):  # a full Redis takes no write
                (there.client.hset if overwrite else there.client.hsetnx)(key, self.name, weight)
