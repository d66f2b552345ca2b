"""Redis commands of backup and restore: all of an expert, read in one MULTI, written in one MULTI.

A restore is to everybody else what a failover to an older replica is: the same lineage, an earlier state, and a
commit id that no memory knows. So an aggregator can commit nothing on top of what it had loaded, and workers send
again what they still keep.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmoe.errors import BackupError, FedMoEError, UnknownExpertError
from fedmoe.protocol.condition import examine
from fedmoe.protocol.layout import check_file, stamped
from fedmoe.protocol.names import check_expert
from fedmoe.protocol.packed import pack_file
from fedmoe.protocol.records import Meta
from fedmoe.protocol.spec import Spec
from fedmoe.store.connection import Connection, execute
from fedmoe.store.full import read_together
from fedmoe.store.lifecycle import new_id

Line = tuple[bytes, Mapping[bytes, bytes]]  # id and fields of a stream's entry

ATTEMPTS = 20  # at a replacement that a busy aggregator's commits get in the way of
MAX_ID = 2**64 - 1  # of either half of a stream's id


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertState:
    """All that Redis keeps of one expert, byte for byte; what still waits in its stream is its workers' own.

    Args:
        spec: the JSON text.
        weights: the safetensors file.
        meta, decided: the hashes.
        log, dead: the streams' entries, oldest first.
    """

    spec: bytes
    weights: bytes
    meta: Mapping[bytes, bytes]
    decided: Mapping[bytes, bytes]
    log: Sequence[Line]
    dead: Sequence[Line]

    def check(self, name: str) -> tuple[Spec, Meta]:
        """Spec and meta of the expert `name`, if all of this fits together, so that it can be served.

        Raises:
            BackupError: saying what does not fit.
        """
        try:
            spec, meta = Spec.from_json(self.spec), Meta.from_hash(self.meta)
            check_file(spec.layout, len(self.weights), self.weights[: len(spec.layout.header)])
        except FedMoEError as error:
            raise BackupError(f"{name}: {error}") from error
        if wrong := examine(self.spec, self.weights, self.meta, self.decided).damage:
            raise BackupError(
                f"{name}: its parts do not belong together ({wrong}): use another backup, or back up after the repair"
            )
        for what, lines in (("log", self.log), ("dead", self.dead)):
            if not _increase(entry_id for entry_id, _ in lines):
                raise BackupError(f"{name}: the entries of its {what} are not in order")
        return spec, meta


def _increase(ids: Iterable[bytes]) -> bool:
    """True if Redis takes these ids one after the other: an XADD that fails would leave a MULTI half executed."""
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
        self._redis = connection.client

    def experts(self) -> dict[str, str]:
        """The federation's experts and their gateway weights as Redis has them, sorted by name.

        Raises:
            SettingsError: for a name that no expert can have.
        """
        with self.connection.errors():
            raw = self._redis.hgetall(self.keys.experts)
        return {check_expert(_text(name)): _text(weight) for name, weight in sorted(raw.items())}

    def read(self, name: str) -> ExpertState:
        """All of one expert, in one MULTI.

        Raises:
            UnknownExpertError: if its spec, weights or meta are not there.
        """
        keys = self.keys.expert(name)
        with self.connection.errors():
            spec, weights, meta, decided, log, dead = read_together(
                self._redis,
                ("get", keys.spec), ("get", keys.weights), ("hgetall", keys.meta), ("hgetall", keys.decided),
                ("xrange", keys.log), ("xrange", keys.dead),
            )  # fmt: skip
        found = {"spec": spec, "weights": weights, "meta": meta}
        if missing := [what for what, content in found.items() if not content]:
            raise UnknownExpertError(
                f"expert {name!r} has no {missing[0]} in Redis (any more): back up the others with --expert"
            )
        return ExpertState(spec=spec, weights=weights, meta=meta, decided=decided, log=log, dead=dead)

    def check(self, name: str, state: ExpertState, *, replace: bool) -> None:
        """Raise what `write` would raise, before anything is written."""
        there = self._look(name)
        if not replace:
            _refuse(there, name, state)

    def write(self, name: str, state: ExpertState, *, gateway_weight: str, replace: bool) -> str | None:
        """Make `state` the expert, whole or not at all, under a new commit id, and list it among the experts.

        The entries of log and dead keep their ids, which tell when each was written; they come in the order in which
        they were read, and later ones get higher ids whatever the server's clock says. What waits in the updates
        stream stays, and is decided against the restored state.

        Args:
            name: of the expert.
            state: that has passed `check`.
            gateway_weight: for the registry.
            replace: also if there is one; else only where nothing is.

        Returns:
            The version that was replaced, "?" if that cannot be told, None if there was none.

        Raises:
            BackupError: if there is one and `replace` is false, or commits come faster than it can be replaced.
        """
        keys, commit = self._of(name), new_id()
        packed = pack_file(
            state.weights, Spec.from_json(state.spec), commit
        )  # before anything is watched: it takes time
        for _ in range(ATTEMPTS):
            with self.connection.errors(), self._redis.pipeline(transaction=True) as pipe:
                # Watched also to be replaced: an EXEC whose reply is lost may run late, but then not on top of
                # what has been committed since.
                pipe.watch(*keys)
                there = self._look(name)  # by another connection: what changes after the WATCH stops the EXEC
                if not replace:
                    _refuse(there, name, state)
                pipe.multi()
                pipe.unlink(*keys)  # also what tells that an operator removed it
                self._queue(pipe, name, state, commit, packed)
                if execute(pipe) is None:
                    continue
                self._redis.hset(self.keys.experts, name, gateway_weight)
                return there
        raise BackupError(
            f"{name} is committed to faster than it can be replaced: stop its aggregator, restore, and start it again"
        )

    def _queue(self, pipe: Any, name: str, state: ExpertState, commit: str, packed: bytes | None) -> None:
        keys = self.keys.expert(name)
        pipe.set(keys.spec, state.spec)
        pipe.set(keys.weights, stamped(state.weights, commit))
        ids = dict.fromkeys((b"commit", b"weights_commit", b"restored"), commit)
        pipe.hset(keys.meta, mapping={**state.meta, **ids})
        if state.decided:
            pipe.hset(keys.decided, mapping=state.decided)
        pipe.unlink(keys.packed, keys.lost, keys.claims)
        if packed:
            pipe.set(keys.packed, packed)
        for key, lines in ((keys.log, state.log), (keys.dead, state.dead)):
            for entry_id, fields in lines:
                pipe.xadd(key, fields, id=entry_id)

    def _of(self, name: str) -> list[str]:
        """The keys of an expert that only aggregators write."""
        keys = self.keys.expert(name)
        return [keys.meta, keys.spec, keys.weights, keys.decided, keys.log, keys.dead]

    def _look(self, name: str) -> str | None:
        """The version of the expert in Redis, "?" if that cannot be told, None if nothing of it is there.

        In a MULTI, since of a user who may not MULTI Redis would execute what is meant for one command by command.
        """
        with self.connection.errors(), self._redis.pipeline(transaction=True) as pipe:
            pipe.hget(self.keys.experts, name)  # must be a hash, and this user's to use
            pipe.exists(*self._of(name))
            pipe.hget(self.keys.expert(name).meta, "version")
            pipe.hget(self.keys.expert(name).meta, "removed")
            listed, exists, version, removed = pipe.execute(raise_on_error=False)
            if isinstance(listed, Exception):
                raise listed
        if not exists or isinstance(removed, bytes):
            return None
        return _text(version) if isinstance(version, bytes) else "?"


def _refuse(there: str | None, name: str, state: ExpertState) -> None:
    if there is not None:
        raise BackupError(
            f"{name} is in Redis already, at version {there} (the backup has version {_text(state.meta[b'version'])}): "
            "--replace puts the backup in its place and undoes what was applied since, --expert restores others only"
        )


def _text(raw: bytes) -> str:
    return raw.decode(errors="backslashreplace")
