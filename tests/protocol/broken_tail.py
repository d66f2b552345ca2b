"""The rules about snapshot and tail, taken out one by one, as in `broken`."""

from fedmoe.protocol.records import Meta
from fedmoe.protocol.tail import Tail
from fedmoe.store.commit import Commit
from fedmoe.store.expert import ExpertStore
from tests.protocol.actors import Rules
from tests.protocol.broken import Broken
from tests.protocol.scopes import TAIL
from tests.protocol.state import Scope


class WeightsBesideTheCommit(ExpertStore):
    """A compaction writes the weights first, and then the rest is committed."""

    def commit(self, commit: Commit) -> None:
        if commit.weights is not None and not commit.packed:
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.set(self.keys.weights, bytes(commit.weights))
                pipe.execute()
        super().commit(commit)


class KeepsNoTail(ExpertStore):
    """A commit names its updates in meta, and does not keep them."""

    def commit(self, commit: Commit) -> None:
        commit.tail = {}
        super().commit(commit)


_with_tail = Meta.with_tail


def keep_tail(meta: Meta, tail: Tail) -> Meta:
    """Whatever writes the weights leaves the tail in meta as it was."""
    return _with_tail(meta, tail) if tail else meta


KEEPS_TAIL = ((Meta, "with_tail", keep_tail),)

BROKEN_TAIL = {
    "H28_weights_with_the_tail_before": Broken(
        what="the weights are written, and meta still names the tail before",
        rules=Rules(patches=KEEPS_TAIL),
        scope=Scope(wire_format=TAIL, faults={"rollback": 1}),
        symptom="the expert is damaged: its weights belong to commit",
    ),
    "H28_weights_beside_the_commit": Broken(
        what="a compaction writes the weights before its commit",
        rules=Rules(expert_store=WeightsBesideTheCommit),
        scope=Scope(wire_format=TAIL, units=1),
        symptom="the expert is damaged: its weights belong to commit",
    ),
    "H28_updates_are_not_kept": Broken(
        what="a commit writes neither the weights nor the updates that it applied",
        rules=Rules(expert_store=KeepsNoTail),
        scope=Scope(wire_format=TAIL, units=1),
        symptom="the expert is damaged: its tail lacks the field 1",
    ),
}
