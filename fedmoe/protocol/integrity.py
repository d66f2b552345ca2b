"""Checks whether the parts of an expert in Redis belong together. Pure.

`meta` is the root: it names the spec by its digest, the weights by the commit that wrote them (a stamp in their
header), the tail by the digest of its last record, and the decided updates of all workers by a stamp over them. So
loading an expert detects a missing or foreign part, and nobody trains on a damaged expert or commits on top of it.

The stamp of the decided updates is the XOR of one digest per worker. So the cost of updating the stamp depends on the
updates in the commit, not on the number of workers.
"""

import hashlib
from collections.abc import Mapping

from fedmoe.protocol.layout import stamp_of
from fedmoe.protocol.records import NO_DECISIONS, Decided, Meta

_BYTES = len(NO_DECISIONS) // 2


def restamp(stamp: str, worker: str, old: Decided | None, new: Decided | None) -> str:
    """The stamp (16 hex digits) after one worker's last decided update changed from `old` to `new`."""
    value = int(stamp, 16)
    for decided in (old, new):
        if decided is not None:
            record = f"{worker}\0{decided.to_json(canonical=True)}".encode()
            value ^= int.from_bytes(hashlib.sha256(record).digest()[:_BYTES])
    return f"{value:0{2 * _BYTES}x}"


def stamp_decided(decided: Mapping[str, Decided]) -> str:
    """The stamp of all workers' last decided updates (worker -> update)."""
    stamp = NO_DECISIONS
    for worker, update in decided.items():
        stamp = restamp(stamp, worker, None, update)
    return stamp


def server_state_problem(meta: Meta, state: bytes | None, length: int) -> str:
    """Why a server state does not fit the weights that meta names, as a clause; "" if it fits, or none should be there.

    Args:
        meta: of the expert.
        state: the safetensors file, None if there is none.
        length: of the weights' file (bytes); both files have the same layout.
    """
    return server_state_misfit(meta, state, length) if meta.server_state else ""


def server_state_misfit(meta: Meta, state: bytes | None, length: int) -> str:
    """As `server_state_problem`, if there should be a server state in any case."""
    if not state:
        return "its server state is missing"
    if len(state) != length:
        return f"its server state has {len(state)} bytes and its weights {length}"
    if (stamp := stamp_of(state)) != meta.snapshot_commit:
        return (
            f"its server state belongs to commit {stamp or 'unknown'}, its weights to {meta.snapshot_commit}"
        )
    return ""


def damage(
    meta: Meta, *, spec: str | None, weights: bytes | memoryview | None, decided: Mapping[str, Decided]
) -> str:
    """Which parts of an expert are missing or do not match its meta, as the end of a sentence; "" if it is whole.

    Args:
        meta: of the expert.
        spec: digest of the present spec, None if there is none.
        weights: the first STAMPED_BYTES of the weights' file, or all of it; None or empty if there is none.
        decided: the last decided update of each worker.
    """
    found = []
    if spec is None:
        found.append("its spec is missing")
    elif spec != meta.spec:
        found.append(f"its spec has digest {spec}, but its meta expects {meta.spec}")
    found.append(weights_problem(meta, weights))
    if stamp_decided(decided) != meta.decided_stamp:
        found.append(
            f"its hash of decided updates ({len(decided)} workers) does not match its meta"
            if decided
            else "its decided updates are missing"
        )
    return "; ".join(filter(None, found))


def weights_problem(meta: Meta, weights: bytes | memoryview | None) -> str:
    """Why these are not the weights that meta names, as the end of a sentence, "" if they are; see `damage`."""
    if not weights:
        return "its weights are missing"
    if (stamp := stamp_of(weights)) == meta.snapshot_commit:
        return ""
    return f"its weights belong to commit {stamp or 'unknown'}, but its meta expects {meta.snapshot_commit}"
