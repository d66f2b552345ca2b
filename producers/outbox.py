"""What a worker does next with its undecided updates: a state machine. Pure.

    state, facts → what to do            `prepare` (with the training and the disk), `talk` (with Redis)
    state, event → state                 `made`, `saved`, `announcing`, `announced`, `pulled`, `lost_sight`

`producers.sync` asks, does it, and tells what came of it. Whatever fails changes no state, so it is tried again.

The order is the protocol's: an update is made, then it is on disk, then it is announced, then its decision is looked
for; and one that was lost sight of is looked for before it is announced again, since a decision may have taken its
payload away meanwhile.
"""

from dataclasses import dataclass, replace
from enum import Enum, auto

from fedmoe.protocol.update import UpdateId


class Prepare(Enum):
    """What to do with the training and the disk."""

    NOTHING = auto()
    MAKE = auto()  # make the training's progress the next update
    SAVE = auto()  # write the checkpoint that the first update waits for
    CHECKPOINT = auto()  # write one between two updates


class Talk(Enum):
    """What to do with Redis."""

    NOTHING = auto()
    PULL = auto()  # read the expert and one's own decision
    HOLD = auto()  # nothing may be announced before it is on disk
    LOOK = auto()  # was it decided, since it was lost sight of?
    ANNOUNCE = auto()  # send it and announce it on the stream
    POLL = auto()  # was it decided?


@dataclass(frozen=True, slots=True, kw_only=True)
class Outbox:
    """Where the first undecided update is on its way.

    Args:
        entry: the stream entry that announces it; None if it is not announced, or was lost sight of.
        sent: the update that was sent last, perhaps in vain.
        must_pull: look at Redis before anything is made or announced (a resumed worker).
        must_save: its checkpoint is not on disk yet.
        checkpointing: a copy of the training was asked for that is no update's.
    """

    entry: str | None = None
    sent: UpdateId | None = None
    must_pull: bool = False
    must_save: bool = False
    checkpointing: bool = False

    def prepare(self, first: UpdateId | None, *, is_due: bool, must_checkpoint: bool) -> Prepare:
        """The next step beside Redis; `first` is the first undecided update, None if there is none.

        `is_due`: it is time for an update. `must_checkpoint`: it is time for a checkpoint.
        """
        if self.must_save:
            return Prepare.SAVE
        if is_due and first is None and not self.must_pull and not self.checkpointing:
            return Prepare.MAKE
        return Prepare.CHECKPOINT if must_checkpoint else Prepare.NOTHING

    def talk(self, first: UpdateId | None) -> Talk:
        """The next step with Redis."""
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
        """An update was made; with a state directory its checkpoint comes first."""
        return replace(self, must_save=must_save)

    def saved(self) -> "Outbox":
        """Its checkpoint is on disk."""
        return replace(self, must_save=False)

    def announcing(self, update: UpdateId) -> "Outbox":
        """It is about to be sent: from now on Redis may know it."""
        return replace(self, sent=update)

    def announced(self, entry: str) -> "Outbox":
        """Its entry is in the stream."""
        return replace(self, entry=entry)

    def pulled(self) -> "Outbox":
        """The books are settled: the entry was another update's, or of a history that is no longer so."""
        return replace(self, entry=None, must_pull=False)

    def lost_sight(self) -> "Outbox":
        """The entry was taken off the stream without a decision, or the expert is gone."""
        return replace(self, entry=None)
