"""The commit by which an operator rolls an expert back to an earlier version, while it is served and trained.

A rollback is a new version with the weights of an earlier one. The decided updates stay, so no worker's chain goes
back. Aggregators and workers notice it like any other commit.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from fedmoe.errors import BackupError, FedMoEError, SettingsError, StaleStateError
from fedmoe.protocol.exact import digests_of
from fedmoe.protocol.features import ROLLBACK, with_feature
from fedmoe.protocol.layout import digest_of, stamped
from fedmoe.protocol.lines import RollbackLine
from fedmoe.protocol.packed import pack_file
from fedmoe.protocol.records import Meta
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.weights_parts import WeightsParts
from fedmoe.store.change import PAUSE_S, whole_expert
from fedmoe.store.commit import Commit
from fedmoe.store.expert import ExpertStore
from fedmoe.store.lifecycle import new_id
from fedmoe.store.parts import NewWeights

PATIENCE_S = 60.0  # how long a rollback is retried while a busy aggregator commits


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionState:
    """An expert's state at one version: all that a rollback puts back.

    Args:
        version, lineage: of the expert then.
        weights: the safetensors file; its stamp does not matter.
        server_state: of the server optimizer `optimizer`, likewise; None and "" if there was none.
    """

    version: int
    lineage: str
    weights: bytes | memoryview
    server_state: bytes | memoryview | None = None
    optimizer: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """A rollback that is ready to be committed.

    Args:
        to: the state that the expert gets.
        by: the operator, for people.
        commit: id of the commit.
        weights, packed: as they are written; packed is None if workers pull the weights themselves.
        server_state: as it is written; None if that version had none.
        digest, state_digest: of weights and server state, for the log; "" for none.
        quick_digests: of both, for meta.
        generation: number of the connection over which the history of `to` was read.
        written: the strings of weights and server state, once their parts are written.
    """

    to: VersionState
    by: str
    commit: str
    weights: bytes
    packed: bytes | None
    server_state: bytes | None
    digest: str
    state_digest: str
    quick_digests: str
    generation: int
    written: NewWeights | None = None


def prepare(spec: Spec, state: VersionState, *, by: str, generation: int) -> Rollback:
    """Everything that takes time, so that a commit of a busy aggregator seldom comes between."""
    commit, server_state = new_id(), state.server_state
    return Rollback(
        to=state,
        by=by,
        commit=commit,
        weights=stamped(state.weights, commit),
        packed=pack_file(state.weights, spec, commit),
        server_state=None if server_state is None else stamped(server_state, commit),
        digest=digest_of(state.weights),
        state_digest="" if server_state is None else digest_of(server_state),
        quick_digests=digests_of(commit, state.weights, server_state),
        generation=generation,
    )


def check_target(name: str, present: int, to: int) -> None:
    """Raise SettingsError unless an expert at version `present` can be rolled back to version `to`."""
    if to == present:
        raise SettingsError(f"{name} is at version {to}: there is nothing to roll back", about="to")
    if not 0 <= to < present:
        raise SettingsError(
            f"{name} is at version {present}, so it cannot be rolled back to version {to}: give --to an earlier one",
            about="to",
        )


def roll_back(store: ExpertStore, rollback: Rollback, *, clock: Callable[[], float] = time.time) -> Meta:
    """Commit a rollback; returns the expert's meta after it.

    The lease holder's next commit then fails: it loads the expert again, and refuses what was trained on the versions
    that were rolled back.

    Raises:
        SettingsError: if the expert does not exist, or its version is not above the one to go back to.
        DamagedExpertError: if it is damaged; RemovedExpertError if it was removed.
        BackupError: if it was created again since.
        FedMoEError: if its log was lost.
        StaleStateError: if another process committed meanwhile, or the connection was opened again.
    """
    meta, logged = whole_expert(store)
    to = rollback.to
    if store.is_claimed():
        raise StaleStateError(
            f"Redis has an older state of {store.name} (version {meta.version}) than an aggregator retains; the "
            "aggregator writes it back first",
            about="rollback",
        )
    check_target(store.name, meta.version, to.version)
    if meta.lineage != to.lineage:
        raise BackupError(
            f"{store.name} was created again: version {to.version} is of lineage {to.lineage}, and the expert's is "
            f"{meta.lineage}",
            about="lineage",
        )
    if logged != meta.version:
        raise FedMoEError(
            f"the log of {store.name} was lost after version {logged}: start an aggregator, which begins it again, and "
            "then try again",
            about="log",
        )
    version = meta.version + 1
    after = replace(
        meta,
        version=version,
        commit=rollback.commit,
        weights_commit=rollback.commit,
        digests=rollback.quick_digests,
        server_state=to.optimizer,
        requires=with_feature(meta.requires, ROLLBACK, True),
        rolled_back=meta.rolled_back.and_also(to.version, meta.version),
        updated_at=clock(),
    ).with_snapshot(rollback.weights)
    line = RollbackLine(
        version=version, rolled_back_to=to.version, by=rollback.by, weights=rollback.digest,
        server_state=rollback.state_digest, optimizer=to.optimizer,
    )  # fmt: skip
    store.commit(
        Commit(
            on=meta.commit,
            generation=rollback.generation,
            meta=after,
            weights=memoryview(rollback.weights),
            packed=rollback.packed,
            server_state=None if rollback.server_state is None else memoryview(rollback.server_state),
            written=rollback.written,
            unlink=[store.keys.server_state] if rollback.server_state is None else [],
            log=[line.to_fields()],
        )
    )
    return after


@contextmanager
def parts_written(store: ExpertStore, rollback: Rollback) -> Iterator[Rollback]:
    """The rollback with its parts in Redis, for as many attempts as it takes: they do not depend on the expert's head.

    They are removed at the end if the last attempt came too late.
    """
    parts = WeightsParts.of(rollback.commit, rollback.weights)
    with (
        store.connection.errors(),
        store.new_weights(parts, rollback.weights, rollback.server_state) as written,
    ):
        yield replace(rollback, written=written)


def roll_back_soon(store: ExpertStore, find: Callable[[Spec], VersionState], *, by: str) -> Meta:
    """Find the state to go back to, write its parts, and retry `roll_back` for PATIENCE_S while an aggregator commits.

    After each new connection the state is found again, because the server may hold another history by then. Raises the
    same errors, and those of `find`, which must read over the store's own connection.
    """
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            whole_expert(store)
            generation, spec = store.connection.generation, store.spec()
            rollback = prepare(spec, find(spec), by=by, generation=generation)
            with parts_written(store, rollback) as ready:
                return _retry(store, ready)
        except StaleStateError as error:
            if time.monotonic() > until:
                raise StaleStateError(
                    f"nothing was changed, try again ({error})", about=error.about
                ) from error
            time.sleep(PAUSE_S)


def _retry(store: ExpertStore, rollback: Rollback) -> Meta:
    """Try for PATIENCE_S; raises StaleStateError then, or if the rollback must be prepared again."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return roll_back(store, rollback)
        except StaleStateError as error:
            is_outdated = error.about == "parts" or rollback.generation != store.connection.generation
            if is_outdated or time.monotonic() > until:
                raise
            time.sleep(PAUSE_S)
