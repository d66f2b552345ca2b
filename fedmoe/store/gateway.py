"""Redis commands for a whole federation: list and read its experts, read and write their merge."""

import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from fedmoe.errors import (
    DamagedExpertError,
    RemovedExpertError,
    SpecError,
    StaleStateError,
    UnknownExpertError,
)
from fedmoe.protocol.exact import Exact, complete
from fedmoe.protocol.fit import Fit
from fedmoe.protocol.merged import MergedMeta
from fedmoe.protocol.names import is_expert
from fedmoe.protocol.records import Entry, Meta
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.weights_parts import PART_BYTES, WHOLE_BYTES
from fedmoe.store.connection import Connection, execute
from fedmoe.store.copies import readings
from fedmoe.store.full import read_together
from fedmoe.store.parts import PART_TTL_MS
from fedmoe.store.reading import ask
from fedmoe.store.rights import check_writes

_REPLACED = "another aggregator replaced the merged gateway meanwhile: it is looked at again"
_EXPIRED = "the parts of the merged gateway expired before all were written: it is built again"


class GatewayStore:
    """Redis commands for building the merged gateway and for exporting adapters."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.keys = connection.keys.merged
        self._list = connection.at(connection.keys.experts)
        self._merged = connection.at(self.keys.meta)

    def _at(self, expert: str) -> Connection:
        return self.connection.at(self.connection.keys.expert(expert).meta)

    def experts(self) -> dict[str, float]:
        """The federation's experts, with the trained gateway, and their gateway weights, sorted by name."""
        with self._list.errors():
            raw = self._list.client.hgetall(self.connection.keys.experts)
        try:
            return {name.decode(): float(weight) for name, weight in sorted(raw.items())}
        except ValueError as error:
            raise SpecError(
                f"a gateway weight in {self.connection.keys.experts} is not a number: "
                "set it (fedmoe expert weight NAME 1)",
                about="gateway_weight",
            ) from error

    def listed(self) -> set[str]:
        """The names of the federation's experts, with the trained gateway, whatever their gateway weights hold."""
        with self._list.errors():
            return {
                key.decode(errors="replace")
                for key in self._list.client.hgetall(self.connection.keys.experts)
            }

    def compare(self, names: Iterable[str]) -> tuple[set[str], set[str]]:
        """The experts of these that are in Redis, and those that an operator removed; the rest are lost for now."""
        fields = [(name, field) for name in names for field in ("version", "removed")]
        commands = {
            (name, field): ("HGET", self.connection.keys.expert(name).meta, field) for name, field in fields
        }
        found: dict[str, set[str]] = {"version": set(), "removed": set()}
        for (name, field), reply in ask(self.connection, commands).items():
            if isinstance(reply, Exception):
                with self.connection.errors():
                    raise reply
            if reply is not None:
                found[field].add(name)
        return found["version"], found["removed"]

    def register(self, name: str, weight: float) -> None:
        """Add an expert to the federation's list, if it is missing there."""
        with self._list.errors():
            self._list.client.hsetnx(self.connection.keys.experts, name, f"{weight:g}")

    def unregister(self, name: str) -> None:
        """Remove an expert from the federation's list."""
        with self._list.errors():
            self._list.client.hdel(self.connection.keys.experts, name)

    def spec(self, expert: str) -> Spec:
        """An expert's spec; raises UnknownExpertError."""
        at = self._at(expert)
        with at.errors():
            text = at.client.get(self.connection.keys.expert(expert).spec)
        if text is None:
            there = ", ".join(self.experts()) or "none yet"
            raise UnknownExpertError(f"there is no expert {expert!r}; there are: {there}", about=expert)
        return Spec.from_json(text)

    def meta(self, expert: str) -> Meta:
        """An expert's meta hash."""
        at = self._at(expert)
        with at.errors():
            raw = at.client.hgetall(self.connection.keys.expert(expert).meta)
        if not raw:
            raise UnknownExpertError(f"expert {expert!r} is gone from Redis", about=expert)
        return Meta.from_hash(raw)

    def metas(self) -> dict[str, Meta]:
        """The meta hashes of the listed experts, by name, without lost, removed and malformed ones."""
        with self._list.errors():
            listed = self._list.client.hgetall(self.connection.keys.experts)
        names = [name for name in sorted(key.decode(errors="replace") for key in listed) if is_expert(name)]
        replies = ask(
            self.connection, {name: ("HGETALL", self.connection.keys.expert(name).meta) for name in names}
        )
        found = {}
        for name, raw in replies.items():
            if isinstance(raw, Exception):
                if "WRONGTYPE" not in str(raw):
                    with self.connection.errors():
                        raise raw
            elif raw:
                with suppress(SpecError, RemovedExpertError):
                    found[name] = Meta.from_hash(raw)
        return found

    def read(self, expert: str) -> tuple[Meta, bytes]:
        """An expert's meta and exact weights, in one MULTI.

        Raises:
            DamagedExpertError: if its parts do not belong together.
        """
        meta, exact, _ = self._parts(expert)
        return meta, exact.weights

    def vectors(self, expert: str) -> dict[str, bytes]:
        """The domain vectors of an expert's workers, as stored; empty if there are none."""
        at = self._at(expert)
        with at.errors():
            raw = at.client.hgetall(self.connection.keys.expert(expert).vectors)
        return _by_worker(raw)

    def history(self, expert: str) -> tuple[Meta, bytes, list[dict[str, str]]]:
        """An expert's meta, weights and whole log (oldest line first), in one MULTI.

        Raises:
            DamagedExpertError: if its parts do not belong together.
        """
        meta, exact, lines, _ = self.whole_history(expert)
        return meta, exact.weights, lines

    def newest_lines(self, experts: Iterable[str], count: int) -> dict[str, list[dict[str, str]]]:
        """The newest lines of each expert's log, at most `count`, oldest first; none of a log that cannot be read."""
        logs = {name: self.connection.keys.expert(name).log for name in experts}
        replies = ask(
            self.connection,
            {name: ("XREVRANGE", log, "+", "-", "COUNT", count) for name, log in logs.items()},
        )
        return {
            name: [] if isinstance(reply, Exception) else [Entry.of(*line).fields for line in reversed(reply)]
            for name, reply in replies.items()
        }

    def whole_history(self, expert: str) -> tuple[Meta, Exact, list[dict[str, str]], dict[str, bytes]]:
        """Like `history`; with the server state, and with the domain vectors of its workers, as stored."""
        keys = self.connection.keys.expert(expert)
        meta, exact, (log, vectors) = self._parts(expert, ("xrange", keys.log), ("hgetall", keys.vectors))
        return meta, exact, [Entry.of(*line).fields for line in log], _by_worker(vectors)

    def _parts(self, expert: str, *more: tuple[str, ...]) -> tuple[Meta, Exact, list[Any]]:
        """Check that an expert's parts belong together; returns its meta, exact values, and the replies to `more`."""
        keys, at = self.connection.keys.expert(expert), self._at(expert)
        with at.errors():
            for found, copies in readings(
                at.client, keys,
                ("hgetall", keys.meta), ("get", keys.weights), ("get", keys.server_state), ("hgetall", keys.tail),
                ("hgetall", keys.decided), ("get", keys.spec), *more,
            ):  # fmt: skip
                raw, weights, state, tail, decided, spec, *replies = found
                if not raw and weights is None:
                    raise UnknownExpertError(f"expert {expert!r} is gone from Redis", about=expert)
                condition, exact = complete(
                    spec, raw, decided, weights=weights, server_state=state, tail=tail, copies=copies
                )
        if condition.meta is None or exact is None:
            raise DamagedExpertError(expert, condition.damage)
        return condition.meta, exact, replies

    def merged(self) -> MergedMeta | None:
        """The merged gateway's meta; None if there is none yet, or its meta is damaged (it is then rebuilt)."""
        with self._merged.errors():
            raw = self._merged.client.hgetall(self.keys.meta)
        return _built(raw)

    def has_weights(self, meta: MergedMeta) -> bool:
        """True if Redis holds the weights of the gateway that this meta names, with all their parts."""
        keys = self._parts_of(meta) or [self.keys.weights]
        with self._merged.errors():
            return bool(self._merged.client.exists(*keys) == len(keys))

    def load_merged(self) -> tuple[MergedMeta, bytes] | None:
        """The merged gateway's meta and its safetensors file, which belong together; None if there is none yet."""
        known = ""
        while True:
            with self._merged.errors():
                raw, weights = read_together(
                    self._merged.client, ("hgetall", self.keys.meta), ("get", self.keys.weights)
                )
            meta = _built(raw)
            if meta is None or not meta.parts:
                return (meta, weights) if meta and weights is not None else None
            if meta.generation == known:  # a part is gone, and nobody has rebuilt the gateway
                return None
            known = meta.generation
            if (weights := self._read_parts(meta)) is not None:
                return meta, weights

    def _read_parts(self, meta: MergedMeta) -> Any:
        """The weights that are stored in parts; None if a part is gone, because the gateway was replaced meanwhile."""
        found = bytearray()  # it does what bytes do here, and needs no second copy
        for key in self._parts_of(meta):
            with self._merged.errors():
                part = self._merged.client.get(key)
            if part is None:
                return None
            found += part
        return found

    def _parts_of(self, meta: MergedMeta | None) -> list[str]:
        if meta is None or not meta.parts:
            return []
        return [self.keys.weights_part(meta.generation, index) for index in range(meta.parts)]

    def write_merged(self, meta: MergedMeta, weights: memoryview) -> None:
        """Replace the merged gateway; weights that are too long for one Redis string are stored in parts.

        Raises:
            StaleStateError: if another builder replaced a gateway in parts meanwhile, or a part expired.
        """
        parts: list[str] = []
        if len(weights) > WHOLE_BYTES:
            count = -(-len(weights) // PART_BYTES)
            meta = replace(meta, generation=secrets.token_hex(4), parts=count)
            parts = self._parts_of(meta)
        before = self._parts_of(self.merged())
        with self._merged.errors(), self._merged.client.pipeline(transaction=True) as pipe:
            if parts or before:
                pipe.watch(self.keys.meta)
                if self._parts_of(_built(pipe.hgetall(self.keys.meta))) != before:
                    raise StaleStateError(_REPLACED, about="gateway")
                # Not in the transaction: a server closes a connection that queues more than 1 GiB.
                for index, key in enumerate(parts):
                    pipe.set(key, weights[index * PART_BYTES : (index + 1) * PART_BYTES], px=PART_TTL_MS)
                if parts:
                    pipe.watch(*parts)
                    if pipe.exists(*parts) != len(parts):
                        raise StaleStateError(_EXPIRED, about="gateway")
                pipe.multi()
            if parts:
                pipe.unlink(self.keys.weights)
            else:
                pipe.set(self.keys.weights, weights)
            pipe.delete(self.keys.meta)
            pipe.hset(self.keys.meta, mapping=meta.to_fields())
            for key in parts:
                pipe.persist(key)
            if before:
                pipe.unlink(*before)
            if execute(pipe) is None:  # or a part has expired just now
                raise StaleStateError(_REPLACED, about="gateway")

    def fit(self) -> Fit | None:
        """The merged gateway's fit; None if Redis holds none. One that an operator gave up has no weights."""
        with self._merged.errors():
            raw = self._merged.client.hgetall(self.keys.fit)
        return Fit.read(raw) if raw else None

    def fit_in_force(self) -> Fit | None:
        """The merged gateway's fit; None if there is none or an operator gave it up."""
        fit = self.fit()
        return fit if fit and fit.weights else None

    def check_may_write_fit(self) -> None:
        """Raise the error by which Redis would refuse a fit now; nothing is written."""
        check_writes(self._merged, [("DEL", self.keys.fit), ("HSET", self.keys.fit, "fitted_at", "0")])

    def write_fit(self, fit: Fit) -> None:
        """Replace the merged gateway's fit."""
        with self._merged.errors(), self._merged.client.pipeline(transaction=True) as pipe:
            pipe.delete(self.keys.fit)
            pipe.hset(self.keys.fit, mapping=fit.to_fields())
            pipe.execute()

    def put_back_fit(self, fit: Fit) -> bool:
        """Write a fit that Redis lost; False if there is one again."""
        with self._merged.errors(), self._merged.client.pipeline(transaction=True) as pipe:
            pipe.watch(self.keys.fit)
            if pipe.exists(self.keys.fit):
                return False
            pipe.multi()
            pipe.hset(self.keys.fit, mapping=fit.to_fields())
            return execute(pipe) is not None

    def complain(self, reason: str) -> None:
        """Write to the merged gateway's meta why it cannot be built; the old one stays."""
        with self._merged.errors():
            self._merged.client.hset(self.keys.meta, "error", reason)


def _by_worker(raw: Mapping[bytes, bytes]) -> dict[str, bytes]:
    return {worker.decode(errors="replace"): text for worker, text in raw.items()}


def _built(raw: Mapping[bytes, bytes]) -> MergedMeta | None:
    """The meta of a merged gateway; None if there is none, or `built_from` cannot be read."""
    meta = MergedMeta.read(raw)
    try:
        return meta if meta.experts else None
    except SpecError:
        return None
