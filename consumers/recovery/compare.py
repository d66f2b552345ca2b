"""Compares the state of an expert in Redis with an aggregator's retained state. Pure.

*Earlier commit of this history* means a commit that the retained state passed through. Comparing versions instead would
undo `fedmoe restore --replace`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from consumers.history import History
from fedmoe.protocol.condition import Condition
from fedmoe.protocol.lines import AppliedLine, Line, RollbackLine, read_line
from fedmoe.protocol.records import Decided, Meta
from fedmoe.protocol.update import UpdateId


def is_of_this_history(history: History, mine: Meta, found: Condition) -> bool:
    """True if the retained state passed through the commit in Redis; without meta, through the weights commit."""
    if history.last != mine.commit:
        return False
    if found.commit:
        return found.commit in history
    known = found.weights_commit in history or found.weights_commit == mine.weights_commit
    return known or not found.weights_commit


def undone(
    lines: Sequence[Line], mine: Mapping[str, Decided], theirs: Mapping[str, Decided]
) -> list[AppliedLine]:
    """The log lines of applied updates that Redis lacks, because its last decided update of their worker is earlier.

    Args:
        lines: of the retained log, oldest first.
        mine: the last decided update of each worker, as retained.
        theirs: the last decided update of each worker in Redis.
    """
    heads = {worker: theirs[worker].id if worker in theirs else None for worker in mine}
    behind = {worker for worker, head in heads.items() if _is_before(head, mine[worker].id)}
    lost: list[AppliedLine] = []
    for line in map(read_line, reversed(lines)):
        if not isinstance(line, AppliedLine) or line.worker not in behind:
            continue
        head = heads[line.worker]
        if head is not None and (line.run, line.seq) == head:
            behind.discard(line.worker)
            continue
        lost.append(line)
        if line.prev == str(head or ""):
            behind.discard(line.worker)
    return lost[::-1]


def _is_before(head: UpdateId | None, last: UpdateId) -> bool:
    """True if `head` precedes `last` in a worker's chain; another run with the same incarnation does not precede."""
    if head is None:
        return True
    return head.seq < last.seq if head.run == last.run else head.incarnation < last.incarnation


def is_change_of_rules(mine: Meta, theirs: Meta) -> bool:
    """True if Redis holds the retained state under a later rule set: only an operator's commit makes such a state."""
    same = replace(theirs, commit=mine.commit, rules=mine.rules, updated_at=mine.updated_at)
    # Compared as stored text, because Redis holds floats with fewer digits.
    return theirs.rules.number > mine.rules.number and same.to_hash() == mine.to_hash()


def rollback_of(mine: Meta, theirs: Meta, last_line: Mapping[bytes, bytes]) -> RollbackLine | None:
    """The line of the one rollback by which an operator made the state in Redis from the retained one; None if not so.

    Like a change of rules, it leaves the fields of meta that count updates as they were.
    """
    same = replace(
        theirs, commit=mine.commit, weights_commit=mine.weights_commit, version=mine.version,
        rolled_back=mine.rolled_back, server_state=mine.server_state, requires=mine.requires,
        tail=mine.tail, parts=mine.parts, digests=mine.digests, updated_at=mine.updated_at,
    )  # fmt: skip
    if theirs.version != mine.version + 1 or same.to_hash() != mine.to_hash() or not last_line:
        return None
    line = read_line(last_line)
    return line if isinstance(line, RollbackLine) and line.version == theirs.version else None


def what_was_lost(mine: Meta, found: Condition) -> str:
    """What Redis lost, as the start of a sentence."""
    if not found.commit and not found.weights_commit:
        return "the expert was missing from Redis"
    if found.damage:
        return f"the expert was damaged in Redis ({found.damage})"
    assert found.meta is not None
    return f"Redis had an older state of the expert (version {found.meta.version}, in memory {mine.version})"
