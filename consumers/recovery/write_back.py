"""The commits by which an aggregator gives Redis back what it lost of an expert: all of it, or what follows from it."""

import logging

from consumers.expert import Expert
from fedmoe.protocol.codec import EXACT
from fedmoe.protocol.lines import AnchorLine, Line
from fedmoe.protocol.packed import pack
from fedmoe.store.expert import Commit, Loaded

logger = logging.getLogger(__name__)


def write_back(expert: Expert, *, on: str, anchor: bool = True) -> bool:
    """Write the expert back whole, on top of what Redis has left of it; True if this did it.

    The same lineage, a new commit id, the state of the last load or commit: for workers a failover like any other.

    Args:
        expert: as it is retained.
        on: the commit that Redis holds, one of its history; "" if it holds none.
        anchor: if it holds none, the log lacks lines too: begin it again.
    """
    meta = expert.next_meta(new_weights=True)
    log: list[Line] = []
    dead: list[Line] = []
    if on:
        log, dead = expert.history.since(on)
    elif anchor:
        log = [_anchor(expert, "written back from memory")]
    expert.buffer.stamp(meta.commit)
    expert.history.attempt(meta.commit)
    return expert.store.write_back(
        expert.spec, meta, expert.buffer.file, on=on, decided=expert.decided, log=log, dead=dead
    )


def rebuild(expert: Expert, loaded: Loaded) -> str:
    """Rebuild the packed weights, and begin the log again, if they are not of this version; "" if both are.

    Raises StaleStateError if somebody else has committed since `loaded`.
    """
    commit = Commit(on=expert.meta.commit, generation=expert.generation, meta=expert.meta)
    lost = []
    if expert.spec.wire_format != EXACT and loaded.packed_commit != expert.meta.weights_commit:
        lost.append("the packed weights")
        commit.packed = pack(expert.buffer.flat, expert.spec, expert.meta.weights_commit)
    if loaded.logged_version != expert.meta.version and expert.meta.version:
        lost.append("the log")
        commit.log.append(_anchor(expert, "the log before was lost"))
    if lost:
        expert.send(commit, expert.next_meta())
    return " and ".join(lost)


def _anchor(expert: Expert, why: str) -> Line:
    """A line of the log from which a replay can begin, if the weights can be kept."""
    weights = ""
    if expert.archive is not None:
        expert.buffer.stamp(expert.meta.weights_commit)  # each try keeps the same bytes, so the same file
        try:
            weights = expert.archive.keep_weights(expert.buffer.file)
        except OSError as error:
            logger.warning(
                "%s cannot be replayed from here on: its weights cannot be kept (%s)",
                expert.store.name,
                error,
            )
    return AnchorLine(version=expert.meta.version, restored=why, weights=weights).to_fields()
