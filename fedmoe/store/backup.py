"""Redis commands of backup and restore: a whole expert is read in one MULTI and written in one MULTI.

For all other processes, a restore looks like a failover to an older replica: the same lineage, an earlier state, and a
new commit id. So no aggregator can commit on top of the state it had loaded, and workers resend the updates they keep.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmoe.errors import BackupError, DamagedExpertError, FedMoEError, UnknownExpertError
from fedmoe.protocol.exact import complete
from fedmoe.protocol.features import PARTS, with_feature
from fedmoe.protocol.layout import check_file, stamped
from fedmoe.protocol.names import check_expert
from fedmoe.protocol.packed import pack_file
from fedmoe.protocol.records import Meta
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.weights_parts import WeightsParts
from fedmoe.store.connection import Connection, execute
from fedmoe.store.copies import readings
from fedmoe.store.lifecycle import new_id
from fedmoe.store.parts import NewWeights, stray_parts

Line = tuple[bytes, Mapping[bytes, bytes]]  # id and fields of a stream entry

ATTEMPTS = 20  # at replacing an expert, because commits of a busy aggregator abort the transaction
MAX_ID = 2**64 - 1  # maximum of either half of a stream entry's id


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertState:
    """Everything that Redis keeps of one expert, except the updates that wait in its stream.

    It is as Redis holds it, byte for byte, but for two things: the tail is folded into weights and server state, and
    each of these is a whole file even if it lies in parts in Redis. Meta names neither tail nor parts. So an earlier
    release can read a backup, too.

    Args:
        spec: the JSON text.
        weights: the safetensors file.
        meta, decided, vectors: the hashes.
        server_state: what the server optimizer remembers, a safetensors file; None if there is none.
        log, dead: the streams' entries, oldest first.
    """

    spec: bytes
    weights: bytes
    meta: Mapping[bytes, bytes]
    decided: Mapping[bytes, bytes]
    log: Sequence[Line]
    dead: Sequence[Line]
    vectors: Mapping[bytes, bytes] = field(default_factory=dict)
    server_state: bytes | None = None

    def check(self, name: str) -> tuple[Spec, Meta]:
        """Check that all parts belong together, so that the expert can be served; returns its spec and meta.

        Raises:
            BackupError: names the part that is damaged.
        """
        try:
            spec, meta = Spec.from_json(self.spec), Meta.from_hash(self.meta)
            check_file(spec.layout, len(self.weights), self.weights[: len(spec.layout.header)])
        except FedMoEError as error:
            raise BackupError(f"{name}: {error}", about=error.about) from error
        condition, exact = complete(
            self.spec,
            self.meta,
            self.decided,
            weights=self.weights,
            server_state=self.server_state,
            tail=None,
        )
        if exact is None:
            wrong = condition.damage
            raise BackupError(
                f"{name}: its parts do not belong together ({wrong}): use another backup, or back up after the repair",
                about="damage",
            )
        for what, lines in (("log", self.log), ("dead", self.dead)):
            if not _increase(entry_id for entry_id, _ in lines):
                raise BackupError(f"{name}: the entries of its {what} are not in order", about=what)
        return spec, meta


def _increase(ids: Iterable[bytes]) -> bool:
    """True if Redis accepts these ids in this order: a failing XADD would leave a MULTI half executed."""
    last = (0, 0)
    for text in ids:
        ms, dash, number = text.partition(b"-")
        if not (dash and ms.isdigit() and number.isdigit()):
            return False
        this = (int(ms), int(number))
        if this <= last or max(this) > MAX_ID:
            return False
        last = this
    return True


class BackupStore:
    """Reads and writes whole experts. Every method may raise RedisUnavailableError."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.keys = connection.keys
        self._list = connection.at(self.keys.experts)

    def _at(self, name: str) -> Connection:
        return self.connection.at(self.keys.expert(name).meta)

    def experts(self) -> dict[str, str]:
        """The federation's experts and their gateway weights as stored text, sorted by name.

        Raises:
            SettingsError: if a name is not a valid expert name.
        """
        with self._list.errors():
            raw = self._list.client.hgetall(self.keys.experts)
        return {check_expert(_text(name)): _text(weight) for name, weight in sorted(raw.items())}

    def read(self, name: str) -> ExpertState:
        """Read a whole expert in one MULTI.

        Raises:
            UnknownExpertError: if its spec, weights or meta are missing.
            DamagedExpertError: if its tail cannot be folded.
        """
        keys, there = self.keys.expert(name), self._at(name)
        with there.errors():
            for replies, copies in readings(
                there.client, keys,
                ("get", keys.spec), ("get", keys.weights), ("hgetall", keys.meta), ("hgetall", keys.decided),
                ("xrange", keys.log), ("xrange", keys.dead), ("hgetall", keys.vectors), ("get", keys.server_state),
                ("hgetall", keys.tail),
            ):  # fmt: skip
                spec, weights, meta, decided, log, dead, vectors, state, tail = replies
                found = {"spec": spec, "weights": weights, "meta": meta}
                if missing := [what for what, content in found.items() if not content]:
                    raise UnknownExpertError(
                        f"expert {name!r} has no {missing[0]} in Redis (any more): back up the others with --expert",
                        about=name,
                    )
                condition, exact = complete(
                    spec, meta, decided, weights=weights, server_state=state, tail=tail, copies=copies
                )
        if condition.meta is not None and (condition.meta.tail or condition.meta.parts):
            if exact is None:
                raise DamagedExpertError(name, condition.damage)
            weights, state = exact.weights, exact.server_state
            without = condition.meta.in_one_string()
            meta = meta | {b"tail": b"", b"parts": b"", b"requires": without.requires.encode()}
        return ExpertState(
            spec=spec,
            weights=weights,
            meta=meta,
            decided=decided,
            log=log,
            dead=dead,
            vectors=vectors,
            server_state=state,
        )

    def check(self, name: str, state: ExpertState, *, replace: bool) -> None:
        """Raise the error that `write` would raise, before anything is written."""
        there = self._look(name)
        if not replace:
            _refuse(there, name, state)

    def write(self, name: str, state: ExpertState, *, gateway_weight: str, replace: bool) -> str | None:
        """Atomically write `state` as the expert, under a new commit id, and list it among the experts.

        Entries of log and dead keep their ids, which tell when each was written; later entries get higher ids, whatever
        the server's clock says. Updates waiting in the stream stay and are decided against the restored state.

        Args:
            name: of the expert.
            state: has passed `check`.
            gateway_weight: for the hash of experts.
            replace: overwrite an existing expert.

        Returns:
            The version that was replaced, "?" if unknown, None if there was no expert.

        Raises:
            BackupError: if the expert exists and `replace` is false, or concurrent commits aborted every attempt.
        """
        keys, commit, at = self._of(name), new_id(), self._at(name)
        packed = pack_file(
            state.weights, Spec.from_json(state.spec), commit
        )  # packing takes time, so it comes before the WATCH
        snapshot, parts = self._snapshot(name, state, commit)
        for _ in range(ATTEMPTS):
            with at.errors(), at.client.pipeline(transaction=True) as pipe:
                # WATCH even if replacing: an EXEC whose reply was lost may run late; it must not overwrite commits made
                # since.
                pipe.watch(*keys, *snapshot.watched)
                snapshot.check(pipe, name)
                there = self._look(name)  # over another connection: a change after the WATCH aborts the EXEC
                if not replace:
                    _refuse(there, name, state)
                snapshot.replaced = list(stray_parts(at.client, self.keys.expert(name), but=parts))
                pipe.multi()
                pipe.unlink(*keys)  # also a meta hash that says that an operator removed the expert
                self.queue(pipe, name, state, commit, packed, snapshot, parts)
                if execute(pipe) is None:
                    continue
            with self._list.errors():
                self._list.client.hset(self.keys.experts, name, gateway_weight)
            return there
        raise BackupError(
            f"commits to {name} abort its replacement each time: stop its aggregator, restore, and start it again",
            about="commits",
        )

    def _snapshot(self, name: str, state: ExpertState, commit: str) -> tuple[NewWeights, WeightsParts]:
        """The weights and the server state as this commit writes them; parts are written already."""
        weights, remembered, at = state.weights, state.server_state, self._at(name)
        parts = WeightsParts.of(commit, weights)
        with at.errors():
            snapshot = NewWeights(
                at.client,
                self.keys.expert(name),
                parts,
                stamped(weights, commit),
                None if remembered is None else stamped(remembered, commit),
            )
        return snapshot, parts

    def queue(
        self,
        pipe: Any,
        name: str,
        state: ExpertState,
        commit: str,
        packed: bytes | None,
        snapshot: NewWeights,
        parts: WeightsParts,
    ) -> None:
        """Queue the commands of a restore."""
        keys = self.keys.expert(name)
        pipe.set(keys.spec, state.spec)
        meta: dict[bytes, bytes] = dict(state.meta)
        meta |= dict.fromkeys((b"commit", b"weights_commit", b"restored"), commit.encode())
        if parts:
            requires = with_feature(meta.get(b"requires", b"").decode(), PARTS, True)
            meta |= {b"parts": parts.to_json().encode(), b"requires": requires.encode()}
        pipe.hset(keys.meta, mapping=meta)
        if state.decided:
            pipe.hset(keys.decided, mapping=state.decided)
        if state.vectors:
            pipe.hset(keys.vectors, mapping=state.vectors)
        pipe.unlink(keys.packed, keys.server_state, keys.tail, keys.lost, keys.claims)
        for key, value in snapshot.strings.items():
            if value is not None:
                pipe.set(key, value)
        snapshot.queue(pipe)
        if packed:
            pipe.set(keys.packed, packed)
        for key, lines in ((keys.log, state.log), (keys.dead, state.dead)):
            for entry_id, fields in lines:
                pipe.xadd(key, fields, id=entry_id)

    def _of(self, name: str) -> list[str]:
        """The keys of an expert that only aggregators write."""
        keys = self.keys.expert(name)
        return [keys.meta, keys.spec, keys.weights, keys.decided, keys.vectors, keys.log, keys.dead]

    def _look(self, name: str) -> str | None:
        """The version of the expert in Redis, "?" if unknown, None if none of its keys exists.

        It uses MULTI to fail early: for a user without MULTI, Redis would execute the commands of `write` one by one.
        """
        with self._list.errors():  # fails if the key is not a hash, or this user may not read it
            self._list.client.hget(self.keys.experts, name)
        there = self._at(name)
        with there.errors(), there.client.pipeline(transaction=True) as pipe:
            pipe.exists(*self._of(name))
            pipe.hget(self.keys.expert(name).meta, "version")
            pipe.hget(self.keys.expert(name).meta, "removed")
            exists, version, removed = pipe.execute(raise_on_error=False)
        if not exists or isinstance(removed, bytes):
            return None
        return _text(version) if isinstance(version, bytes) else "?"


def _refuse(there: str | None, name: str, state: ExpertState) -> None:
    if there is not None:
        raise BackupError(
            f"{name} is in Redis already, at version {there} (the backup has version {_text(state.meta[b'version'])}): "
            "--replace overwrites it with the backup and undoes later updates, --expert restores only other experts",
            about="replace",
        )


def _text(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")
