"""What a pull has brought, in words: for the log, and in the status that progress line and heartbeat show."""

import logging
from dataclasses import replace

import torch

from fedmoe.protocol.rules import RuleSet
from producers.heartbeat import SyncStatus
from producers.ledger import Change, Ledger

logger = logging.getLogger(__name__)


def told(status: SyncStatus, change: Change, ledger: Ledger, steps: int) -> SyncStatus:
    """Log what a change means; the status after it. `steps` were in no update yet before it."""
    if change.how is not None:
        refused = change.how.how == "refused"
        if refused:
            logger.warning("update %s was refused: %s", change.how.id, change.how.reason)
        status = replace(
            status,
            undecided=0,
            staleness=change.how.staleness,
            applied=status.applied + len(change.decided) - refused,
            refused=status.refused + refused,
        )
    if change.resent:
        logger.warning(
            "Redis has an older state: version %d before, version %d now; %d updates are sent again, nothing to do",
            status.version, ledger.meta.version, len(change.resent),
        )  # fmt: skip
    if change.lost:
        logger.warning("Redis has an older state than kept here: the updates %s are lost", change.lost)
    if change.replace:
        logger.warning(
            "the expert's history is not the one known here (%s): %d undecided updates and %d steps since are "
            "dropped, going on from its current weights",
            "this worker was restored from an old checkpoint"
            if change.position
            else "an operator created the expert from zero",
            len(change.dropped),
            steps,
        )
    queue = ledger.queue
    return replace(status, version=ledger.meta.version, in_flight=queue[0].header.seq if queue else 0)


def change_of_rules(before: RuleSet, now: RuleSet, tokenized_to: int) -> str:
    """The sentence for a worker that takes over other rules; its rows were truncated to so many tokens."""
    changed = before.differences(now) or "nothing that this FedMoE knows"
    text = f"rules {now.number} are in force, they were {before.number}: {changed}"
    if now.training.max_length != tokenized_to:
        text += "; max_length takes effect when this worker is started again, because its rows are tokenized"
    return text


def has_diverged(progress: torch.Tensor, steps: int, bound: float) -> bool:
    """True, and said, if so many steps changed the adapter by more than the L2 norm that updates may have."""
    norm = float(torch.linalg.vector_norm(progress))
    if norm <= bound:
        return False
    logger.warning(
        "the training diverged: %d steps changed the adapter by a norm of %.3g, the bound is %.4g; they are "
        "dropped, going on from the expert's weights (is the learning rate too high?)",
        steps, norm, bound,
    )  # fmt: skip
    return True
