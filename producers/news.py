"""Says what a pull means: whether to go on, in the log, and in the status that progress line and heartbeat show."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from fedmoe.errors import RefusedError
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.records import Meta
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.spec import Spec
from fedmoe.util.text import counted
from producers.heartbeat import SyncStatus
from producers.ledger import Change, Ledger

logger = logging.getLogger(__name__)


def check_still_welcome(meta: Meta, spec: Spec, identity: BaseIdentity, expert: str) -> None:
    """Raise RefusedError if every further update of a worker with this spec and base model would be refused."""
    if meta.spec != spec.digest:
        raise RefusedError(
            f"expert {expert!r} was created again with another spec: restart this worker", about="spec"
        )
    if refusal := identity.refusal(meta, expert):
        raise RefusedError(refusal, about=identity.differing(meta)[0])


def status_after(status: SyncStatus, change: Change, ledger: Ledger) -> SyncStatus:
    """Log the meaning of a change, except for what it drops (`tell_drop`); return the status after it."""
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
            "Redis has an older state: version %d before, version %d now; this worker sends %s again automatically",
            status.version, ledger.meta.version, counted(len(change.resent), "update"),
        )  # fmt: skip
    if change.lost:
        logger.warning(
            "Redis went back further than this worker keeps updates: the updates %s are lost", change.lost
        )
    queue = ledger.queue
    return replace(status, version=ledger.meta.version, in_flight=queue[0].header.seq if queue else 0)


def tell_drop(change: Change, ledger: Ledger, expert: str) -> Callable[[int], None]:
    """Logs what a change that replaces the adapter drops; is given the number of steps, once it is known.

    The training thread calls it: so the sentence names the expert, because a worker may train two.
    """
    latest = ledger.meta.rolled_back.latest if change.rolled_back else ()

    def of_rollback(steps: int) -> None:
        logger.warning(
            "an operator rolled expert %r back to version %d, version %d has its weights: this worker drops %s that it "
            "trained on what was rolled back, and continues from the expert's current weights",
            expert, *latest, counted(steps, "step"),
        )  # fmt: skip

    def of_history(steps: int) -> None:
        logger.warning(
            "the history of expert %r is not the one that this worker knew (%s): this worker drops %s and %s since, "
            "and continues from the expert's current weights",
            expert,
            "this worker was restored from an old checkpoint"
            if change.position
            else "an operator created the expert from zero",
            counted(len(change.dropped), "undecided update"),
            counted(steps, "step"),
        )

    return of_rollback if change.rolled_back else of_history


class Fixed(NamedTuple):
    """Rules that a worker follows only from its next start on.

    Args:
        max_length: tokens that its rows were truncated to; None if they do not follow the rules of this expert.
        train: the rule by which it was started; None if it does not follow it.
    """

    max_length: int | None = None
    train: str | None = None


def change_of_rules(before: RuleSet, now: RuleSet, fixed: Fixed) -> str:
    """The message of a worker that adopts new rules, all but those that are fixed until it is started again."""
    same = replace(now, number=before.number, released=before.released) == before
    changed = before.differences(now) or (
        "the same rules as before" if same else "a rule changed that this FedMoE does not know"
    )
    text = f"rules {now.number} are in force, they were {before.number}: {changed}"
    if fixed.train is not None and now.train != fixed.train:
        text += "; train takes effect when this worker is started again"
    if fixed.max_length is not None and now.training.max_length != fixed.max_length:
        text += "; max_length takes effect when this worker is started again, because its rows are tokenized already"
    return text


def tell_diverged(norm: float, steps: int, bound: float, expert: str) -> Callable[[int], None]:
    """Logs that the steps of a copy are dropped for their norm; is given the number of steps since that copy."""

    def tell(since: int) -> None:
        logger.warning(
            "the training of expert %r diverged: %s changed the adapter by a norm of %.3g, the bound is %.4g; this "
            "worker drops %s, and continues from the expert's weights (is the learning rate too high?)",
            expert, counted(steps, "step"), norm, bound, counted(steps + since, "step"),
        )  # fmt: skip

    return tell
