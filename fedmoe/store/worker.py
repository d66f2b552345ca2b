"""The worker's side of one expert: publish, poll and pull, beside its presence.

Each method makes one attempt; the caller retries. Publishing twice is harmless: (run, seq) always names the same
content, and the aggregator decides it once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import redis

from fedmoe.errors import (
    DamagedExpertError,
    IncompleteUpdateError,
    LostExpertError,
    ProtocolError,
    RedisUnavailableError,
    RemovedExpertError,
    UnknownExpertError,
)
from fedmoe.protocol import features, records
from fedmoe.protocol.doorbell import Doorbell
from fedmoe.protocol.exact import exact_or_damage
from fedmoe.protocol.formats import EXACT
from fedmoe.protocol.integrity import weights_problem
from fedmoe.protocol.packed import chunks
from fedmoe.protocol.records import Decided, Meta, check_not_removed, read_protocol
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import PAYLOAD_TTL_S, Header, UpdateId
from fedmoe.protocol.weights_parts import values_bytes
from fedmoe.store.chunks import values_and_stamp
from fedmoe.store.connection import Connection
from fedmoe.store.copies import readings
from fedmoe.store.full import NEARLY_FULL, is_full, memory_share, read_together
from fedmoe.store.parts import read_chunks
from fedmoe.store.presence import Presence

HALF_WRITTEN_TTL_S = 3600  # of an update that is not announced yet: its worker may die while it writes


class NoExpertsError(UnknownExpertError):
    """There is no expert yet; an aggregator will create some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """An expert and this worker's last decided update, read in one MULTI; the weights as bytes.

    `packed` and `exact` are both () if the caller has these weights already, or the expert was created again with
    another spec.

    Args:
        packed: the packed weights in chunks, preamble first.
        exact: the values of the exact weights in chunks.
    """

    meta: Meta
    decided: Decided | None
    packed: tuple[bytes, ...] = ()
    exact: tuple[bytes | memoryview, ...] = ()


@dataclass(frozen=True, slots=True)
class Poll:
    """Reply to a poll: this worker's last decided update, the expert's state, and whether the entry still waits."""

    decided: Decided | None
    lineage: str
    version: int
    weights_commit: str
    entry_waits: bool


class WorkerStore(Presence):
    """Redis commands of one worker of one expert. Every method may raise RedisUnavailableError."""

    def __init__(self, connection: Connection, expert: str, worker: str) -> None:
        super().__init__(connection, expert, worker)
        self._knows = ""  # the features of the expert's aggregators, as seen last
        self.announced: UpdateId | None = None  # the update whose XADD was sent and may have been executed

    def spec(self) -> Spec:
        """The expert's spec.

        Raises:
            UnknownExpertError: names the existing experts.
            LostExpertError: if it is one of them, and nothing else is there.
            DamagedExpertError: if only the spec is missing.
        """
        listed: list[bytes] = []
        with self.connection.errors():
            text = self._redis.get(self.keys.spec)
        if text is None:  # why? The list is read first: an expert is listed only after it was created
            experts = self.connection.keys.experts
            there = self.connection.at(experts)
            with there.errors():
                listed = there.client.hkeys(experts)
            with self.connection.errors(), self._redis.pipeline(transaction=True) as pipe:
                pipe.get(self.keys.spec)
                pipe.hgetall(self.keys.meta)
                text, meta = pipe.execute()
        if text is not None:
            return Spec.from_json(text)
        check_not_removed(meta)
        names = sorted(name.decode() for name in listed)
        if meta:
            raise DamagedExpertError(self.expert, "its spec is missing")
        if self.expert in names:
            raise LostExpertError(self.expert)
        where = f"there is no expert {self.expert!r} at {self.connection.settings.shown}"
        if not names:
            raise NoExpertsError(
                f"{where}; there are none yet: start `fedmoe aggregator run`", about=self.expert
            )
        raise UnknownExpertError(f"{where}; there are {', '.join(names)}", about=self.expert)

    def meta(self) -> Meta:
        """The expert's meta hash. Raises ProtocolError if worker and aggregators speak another protocol."""
        with self.connection.errors():
            raw = self._redis.hgetall(self.keys.meta)
        return self._meta(raw)

    def _meta(self, raw: Mapping[bytes, bytes]) -> Meta:
        if not raw:
            raise LostExpertError(self.expert)
        meta = Meta.from_hash(raw)
        self._check_aggregators(meta.protocol, meta.knows)
        return meta

    def _check_aggregators(self, protocol: int, knows: str) -> None:
        """Raise ProtocolError if the aggregators are too old for this worker; parsing meta detects the reverse."""
        self._knows = knows
        if protocol < records.PROTOCOL:
            raise ProtocolError(
                f"the aggregators of expert {self.expert!r} speak protocol {protocol} and this worker protocol "
                f"{records.PROTOCOL}: upgrade the FedMoE of the aggregators first",
                about="protocol",
            )
        if odd := features.lacking(features.UPDATES_REQUIRE, knows):
            raise ProtocolError(
                f"this worker's updates need {', '.join(odd)}, which the aggregators of expert {self.expert!r} do not "
                "know: upgrade the FedMoE of the aggregators first",
                about="requires",
            )

    def pull(self, spec: Spec, *, known: str) -> Pull:
        """Read meta and this worker's last decision in one MULTI, with the weights if their commit is not `known`.

        `known` is "" if the worker has no weights or has seen that they changed; they are then read at once.
        If the expert was created again with another spec, no weights are returned: the worker must stop.
        The weights are packed, unless the format is fp32; if they cannot be used, call `pull_exact`.

        Raises:
            ProtocolError: if worker and aggregators speak another protocol.
            SpecError: if the exact weights are not those of an adapter of `spec`.
        """
        reads = self._reads
        if known:
            with self.connection.errors():
                raw, decided = read_together(self._redis, *reads)
            if self._meta(raw).weights_commit == known:
                return self._pulled(raw, decided)
        if spec.wire_format == EXACT:
            return self.pull_exact(spec)
        with self.connection.errors():
            raw, decided, *packed = self._read_packed(reads, spec)
        pulled = self._pulled(raw, decided)
        return replace(pulled, packed=tuple(packed)) if pulled.meta.spec == spec.digest else pulled

    def pull_exact(self, spec: Spec) -> Pull:
        """Like `pull`, but always with the exact weights."""
        return self._pull_written(spec) if spec.wire_format == EXACT else self._pull_folded(spec)

    def _pull_written(self, spec: Spec) -> Pull:
        """The exact weights as they lie there: in format fp32 there is no tail."""
        with self.connection.errors():
            raw, decided, *file = read_chunks(self._redis, self.keys, spec.layout, *self._reads)
        pulled = self._pulled(raw, decided)
        if pulled.meta.spec != spec.digest:
            return pulled
        if 0 < file[0] < pulled.meta.parts.n_bytes:
            raise DamagedExpertError(self.expert, pulled.meta.parts.lost)
        values, _ = values_and_stamp(spec.layout, file) or ((), "")
        if problem := weights_problem(pulled.meta, file[1]):
            raise DamagedExpertError(self.expert, problem)
        return replace(pulled, exact=tuple(values))

    def _pull_folded(self, spec: Spec) -> Pull:
        """The exact weights with the tail folded into them."""
        keys = self.keys
        above = ("get", keys.weights), ("get", keys.server_state), ("hgetall", keys.tail)
        with self.connection.errors():
            for replies, copies in readings(self._redis, keys, *self._reads, *above):
                raw, decided, weights, state, tail = replies
                pulled = self._pulled(raw, decided)
                if pulled.meta.spec != spec.digest:
                    return pulled
                if 0 < len(weights or b"") < pulled.meta.parts.n_bytes:
                    raise DamagedExpertError(self.expert, pulled.meta.parts.lost)
                if problem := weights_problem(pulled.meta, weights):
                    raise DamagedExpertError(self.expert, problem)
                exact, wrong = exact_or_damage(
                    pulled.meta, spec, weights=weights, server_state=state, tail=tail, copies=copies
                )
        if exact is None:
            raise DamagedExpertError(self.expert, wrong)
        return replace(pulled, exact=(values_bytes(exact.weights),))

    @property
    def _reads(self) -> tuple[tuple[str, ...], ...]:
        return ("hgetall", self.keys.meta), ("hget", self.keys.decided, self.worker)

    def _pulled(self, raw: Mapping[bytes, bytes], decided: bytes | None) -> Pull:
        return Pull(meta=self._meta(raw), decided=Decided.from_json(decided) if decided else None)

    def _read_packed(self, reads: Sequence[tuple[str, ...]], spec: Spec) -> list[Any]:
        packed = [("getrange", self.keys.packed, *place) for place in chunks(spec)]
        try:
            return read_together(self._redis, *reads, *packed)
        except redis.ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
        return [
            *read_together(self._redis, *reads),
            b"",
        ]  # the key was overwritten; the worker pulls the exact weights

    def poll(self, entry_id: str, header: Header) -> Poll:
        """Ask what became of the update that `entry_id` announced; raises ProtocolError as `pull` does."""
        with self.connection.errors():
            (lineage, version, weights_commit, protocol, requires, knows, removed), decided, entries = (
                read_together(
                    self._redis,
                    (
                        "hmget",
                        self.keys.meta,
                        ["lineage", "version", "weights_commit", "protocol", "requires", "knows", "removed"],
                    ),
                    ("hget", self.keys.decided, self.worker),
                    ("xrange", self.keys.updates, entry_id, entry_id),
                )
            )
        if removed is not None:
            raise RemovedExpertError(self.expert, removed.decode(errors="replace"))
        if lineage is None or weights_commit is None:
            raise LostExpertError(self.expert)
        if version is None or not version.isdigit():
            raise DamagedExpertError(self.expert, "its version is missing or not a number")
        number = read_protocol(protocol)
        features.check_requires((requires or b"").decode(errors="replace"), "the expert")
        self._check_aggregators(number, (knows or b"").decode(errors="replace"))
        # After a failover, another worker's entry may have this id.
        waits = any(
            fields.get(b"worker") == self.worker.encode()
            and fields.get(b"run") == header.run.encode()
            and fields.get(b"seq") == str(header.seq).encode()
            for _, fields in entries
        )
        return Poll(
            Decided.from_json(decided) if decided else None,
            lineage.decode(),
            int(version),
            weights_commit.decode(),
            waits,
        )

    def publish(self, header: Header, parts: Sequence[bytes]) -> str:
        """Write parts and header, then add the stream entry; returns the entry's id.

        Raises:
            RedisUnavailableError: also if a part is incomplete on the server, or Redis is nearly full: retry.
        """
        self._hold_back_if_nearly_full(header.payload_bytes)
        header = header.known_by(self._knows, parts)
        again = self.announced == header.id
        run, seq = header.run, header.seq
        blobs = {self.keys.part(self.worker, run, seq, index): part for index, part in enumerate(parts)}
        blobs[self.keys.header(self.worker, run, seq)] = header.pack()
        with self.connection.errors():
            try:
                with self._redis.pipeline(transaction=False) as pipe:
                    for key, blob in blobs.items():
                        pipe.set(key, blob, ex=PAYLOAD_TTL_S if again else HALF_WRITTEN_TTL_S)
                    pipe.execute()
                self.announced = header.id
                with self._redis.pipeline(transaction=True) as pipe:
                    for key in blobs:
                        pipe.strlen(key)
                    for key in blobs:
                        pipe.pexpire(key, PAYLOAD_TTL_S * 1000)
                    # After the server was emptied, the worker's next run must not get this run's incarnation.
                    pipe.set(
                        self.keys.incarnation(self.worker), header.id.incarnation, ex=PAYLOAD_TTL_S, nx=True
                    )
                    pipe.xadd(self.keys.updates, Doorbell.of(header, self.worker).to_fields())
                    *replies, entry_id = pipe.execute()
            except redis.RedisError as error:
                if is_full(error) and not again:
                    # Otherwise half-written updates of several workers fill Redis, and none is completed.
                    self.announced = None
                    self._redis.delete(*blobs)
                raise
        if replies[: len(blobs)] != [len(blob) for blob in blobs.values()]:
            raise IncompleteUpdateError(
                "the update is incomplete on the server; the worker resends it", about="parts"
            )
        return str(entry_id.decode())

    def _hold_back_if_nearly_full(self, n_bytes: int) -> None:
        """Back-pressure: raise RedisUnavailableError if n_bytes more nearly fill Redis while updates wait.

        Their commit will free memory. If no updates wait, holding back does not help: the worker tries to write.
        """
        with self.connection.errors():
            if memory_share(self._redis, n_bytes) > NEARLY_FULL and self._redis.xrange(
                self.keys.updates, count=1
            ):
                raise RedisUnavailableError(
                    f"Redis at {self.connection.settings.shown} is nearly full and updates wait: "
                    "this worker holds its update back",
                    about="maxmemory",
                )

    def next_incarnation(self) -> int:
        """A new incarnation: higher than those of this worker's earlier runs, even while their updates still wait."""
        key = self.keys.incarnation(self.worker)
        with self.connection.errors(), self._redis.pipeline(transaction=True) as pipe:
            pipe.incr(key)
            pipe.pexpire(key, PAYLOAD_TTL_S * 1000)
            incarnation, _ = pipe.execute()
        return int(incarnation)
