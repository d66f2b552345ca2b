"""The state machine of a worker's undecided updates: what to do next. Pure.

    state, facts → what to do            `prepare` (with the training and the disk), `talk` (with Redis)
    state, event → state                 `made`, `saved`, `announcing`, `announced`, `pulled`, `lost_sight`

`producers.sync` asks for the next action, performs it and reports the result. A failure changes no state, so the action
is retried.

The protocol sets the order: an update is made, saved to disk, announced, and polled for its decision. If its entry is
gone, the worker first looks for a decision and only then announces the update again, because a decision may have
removed the payload meanwhile.
"""

from dataclasses import dataclass, replace
from enum import Enum, auto

from fedmoe.protocol.update import UpdateId


class Prepare(Enum):
    """The next action with the training and the disk."""

    NOTHING = auto()
    MAKE = auto()  # turn the training's progress into the next update
    SAVE = auto()  # write the checkpoint that must precede the first update
    CHECKPOINT = auto()  # write a checkpoint between two updates


class Talk(Enum):
    """The next action with Redis."""

    NOTHING = auto()
    PULL = auto()  # read the expert and the worker's own decision
    HOLD = auto()  # wait: an update must be on disk before it is announced
    LOOK = auto()  # look for the decision of an update whose entry is gone
    ANNOUNCE = auto()  # send the update and announce it on the stream
    POLL = auto()  # look for the decision of an announced update


@dataclass(frozen=True, slots=True, kw_only=True)
class Outbox:
    """The progress of the first undecided update.

    Args:
        entry: the stream entry that announces it; None if it is not announced, or its entry is gone.
        sent: the update that was sent last; Redis may not have received it.
        must_pull: pull before an update is made or announced (after a resume).
        must_save: the checkpoint of the update is not on disk yet.
        checkpointing: a copy of the training was requested for a checkpoint, not for an update.
    """

    entry: str | None = None
    sent: UpdateId | None = None
    must_pull: bool = False
    must_save: bool = False
    checkpointing: bool = False

    def prepare(self, first: UpdateId | None, *, is_due: bool, must_checkpoint: bool) -> Prepare:
        """The next action with training and disk; `first` is the first undecided update, None if there is none.

        `is_due`: the next update is due. `must_checkpoint`: the next checkpoint is due.
        """
        if self.must_save:
            return Prepare.SAVE
        if is_due and first is None and not self.must_pull and not self.checkpointing:
            return Prepare.MAKE
        return Prepare.CHECKPOINT if must_checkpoint else Prepare.NOTHING

    def talk(self, first: UpdateId | None) -> Talk:
        """The next action with Redis."""
        if self.must_pull:
            return Talk.PULL
        if self.must_save:
            return Talk.HOLD
        if first is None:
            return Talk.NOTHING
        if self.entry is not None:
            return Talk.POLL
        return Talk.LOOK if self.sent == first else Talk.ANNOUNCE

    def made(self, *, must_save: bool) -> "Outbox":
        """An update was made; with a state directory its checkpoint must be saved first."""
        return replace(self, must_save=must_save)

    def saved(self) -> "Outbox":
        """The checkpoint of the update is on disk."""
        return replace(self, must_save=False)

    def announcing(self, update: UpdateId) -> "Outbox":
        """The update is about to be sent: from now on Redis may hold it."""
        return replace(self, sent=update)

    def announced(self, entry: str) -> "Outbox":
        """The entry of the update is in the stream."""
        return replace(self, entry=entry)

    def pulled(self) -> "Outbox":
        """A pull has settled the books: the entry belongs to another update, or to an abandoned history."""
        return replace(self, entry=None, must_pull=False)

    def lost_sight(self) -> "Outbox":
        """The entry was removed from the stream without a decision, or the expert is gone."""
        return replace(self, entry=None)
