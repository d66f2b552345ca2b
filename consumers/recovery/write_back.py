"""The commits by which an aggregator restores what Redis lost of an expert: all of it, or only derived parts."""

import logging

from consumers.expert import Expert
from consumers.retention import keep_values
from fedmoe.protocol.formats import EXACT
from fedmoe.protocol.layout import stamped
from fedmoe.protocol.lines import AnchorLine, Line
from fedmoe.protocol.packed import pack
from fedmoe.store.commit import Commit, Loaded

logger = logging.getLogger(__name__)


def write_back(expert: Expert, *, on: str, anchor: bool = True) -> bool:
    """Write the whole expert back, on top of what is left in Redis; False if another process wrote to it.

    It writes the state of the last load or commit, with the same lineage and a new commit id: for workers this looks
    like a failover.

    Args:
        expert: the retained state.
        on: the commit in Redis, one of this history; "" if Redis has none.
        anchor: write an anchor line if Redis has no commit, because its log lacks lines too.
    """
    meta = expert.next_meta(new_weights=True).with_snapshot(expert.buffer.file)
    log: list[Line] = []
    dead: list[Line] = []
    if on:
        log, dead = expert.history.since(on)
    elif anchor:
        log = [_anchor(expert, "written back from memory")]
    expert.held.stamp(meta.commit)
    expert.history.attempt(meta.commit)
    return expert.store.write_back(
        expert.spec,
        meta,
        expert.buffer.file,
        on=on,
        decided=expert.decided,
        vectors=expert.vectors,
        server_state=expert.held.state_file,
        log=log,
        dead=dead,
    )


def rebuild(expert: Expert, loaded: Loaded) -> str:
    """Rebuild packed weights of another commit, and add an anchor line to a log that ends at another version.

    Returns what was rebuilt, "" if nothing. Raises StaleStateError if another process committed since `loaded`.
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


def keep_rolled_back(expert: Expert) -> None:
    """Keep the weights that a rollback has just put in place, so that a replay need not reach back to their version."""
    rolled_back = expert.meta.rolled_back
    if expert.archive is None or not rolled_back.intervals or rolled_back.made != expert.meta.version:
        return
    try:
        for file in (expert.buffer.file, expert.held.state_file):
            if file is not None:
                expert.archive.keep_weights(stamped(file, ""))
    except OSError as error:
        logger.warning(
            "%s: the weights of version %d, to which it was rolled back, cannot be kept (%s)",
            expert.store.name, rolled_back.latest[0], error,
        )  # fmt: skip


def _anchor(expert: Expert, why: str) -> Line:
    """A log line from which a replay can start, if the weights can be kept."""
    weights = state = ""
    if expert.archive is not None:
        expert.held.stamp(expert.meta.weights_commit)  # retries keep the same bytes, hence the same file
        try:
            weights, state = keep_values(expert.archive, expert.held)
        except OSError as error:
            logger.warning(
                "%s cannot be replayed from this version on: its weights cannot be kept (%s)",
                expert.store.name,
                error,
            )
    optimizer = expert.held.optimizer if state else ""
    return AnchorLine(
        version=expert.meta.version, restored=why, weights=weights, server_state=state, optimizer=optimizer
    ).to_fields()
