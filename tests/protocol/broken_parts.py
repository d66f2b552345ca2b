"""The rules about weights in parts, taken out one by one, as in `broken`."""

from typing import Any
from unittest.mock import patch

import redis

from fedmoe.protocol.records import Meta
from fedmoe.protocol.weights_parts import WeightsParts
from fedmoe.store.expert import ExpertStore
from fedmoe.store.parts import NewWeights
from fedmoe.store.rollback import Rollback, roll_back
from tests.protocol.actors import Rules
from tests.protocol.broken import Broken
from tests.protocol.state import Scope

_of, _with_snapshot, _check = WeightsParts.of, Meta.with_snapshot, NewWeights.check


def named_by_the_weights(meta: Meta, weights: Any) -> Meta:
    """Parts have the name of the commit whose weights they hold, which a compaction writes once more."""
    after = _with_snapshot(meta, weights)
    return after.with_parts(_of(meta.weights_commit, weights))


def one_name_for_all(commit: str, file: Any) -> WeightsParts:
    """Each commit writes over the parts of the one before."""
    return _of("here", file)


def checked_once(store: ExpertStore, rollback: Rollback, **options: Any) -> Meta:
    """A rollback checks its parts at its first attempt only."""

    def check(new: NewWeights, pipe: Any, expert: str) -> None:
        if not vars(new).get("is_checked"):
            _check(new, pipe, expert)
        vars(new)["is_checked"] = True

    with patch.object(NewWeights, "check", check):
        return roll_back(store, rollback, **options)


def makes_nothing_permanent(new: NewWeights, pipe: Any) -> None:
    """A commit leaves its parts to expire."""
    for name in new.replaced:
        pipe.unlink(name)


def removes_nothing(new: NewWeights, pipe: Any) -> None:
    """A commit leaves the parts of the one before."""
    for name in new.parts:
        pipe.persist(name)


def removes_only_others(new: NewWeights, pipe: Any) -> None:
    """A commit keeps the parts that it has written over those of the one before."""
    for name in new.parts:
        pipe.persist(name)
    for name in new.replaced:
        if name not in new.parts:
            pipe.unlink(name)


def removed_after_any_error(new: NewWeights, kind: type[BaseException] | None, *_: object) -> None:
    """An aggregator that gets no reply to its commit removes the parts it wrote."""
    if kind and new.parts and issubclass(kind, redis.RedisError):
        new._client.unlink(*new.parts)


IN_PLACE = ((WeightsParts, "of", one_name_for_all), (NewWeights, "queue", removes_only_others))

BROKEN_PARTS = {
    "H29_written_in_place": Broken(
        what="parts are overwritten before the commit",
        rules=Rules(patches=IN_PLACE),
        scope=Scope(parts=True, units=2),
        symptom="is in use and expires",
    ),
    "H29_nothing_is_checked": Broken(
        what="parts expire before the commit that names them",
        rules=Rules(patches=((NewWeights, "check", lambda *_: None),)),
        scope=Scope(parts=True, units=1, faults={"orphans": 1}),
        symptom="the expert is damaged: of the 1 parts of its weights",
    ),
    "H29_not_checked_at_each_attempt": Broken(
        what="parts expire between two attempts at a rollback",
        rules=Rules(roll_back=checked_once),
        scope=Scope(parts=True, units=1, faults={"rollback": 1, "orphans": 1}),
        symptom="the expert is damaged: of the 1 parts of its weights",
    ),
    "H29_removed_after_a_lost_reply": Broken(
        what="parts are removed after a commit that may have been executed",
        rules=Rules(patches=((NewWeights, "__exit__", removed_after_any_error),)),
        scope=Scope(parts=True, units=1, faults={"lost": 1}),
        symptom="the expert is damaged: of the 1 parts of its weights",
    ),
    "H29_nothing_is_permanent": Broken(
        what="parts expire after the commit that names them",
        rules=Rules(patches=((NewWeights, "queue", makes_nothing_permanent),)),
        scope=Scope(parts=True, units=1),
        symptom="is in use and expires",
    ),
    "H29_nothing_is_removed": Broken(
        what="the parts of an earlier commit stay",
        rules=Rules(patches=((NewWeights, "queue", removes_nothing),)),
        scope=Scope(parts=True, units=2),
        symptom="is of no use and stays for ever",
    ),
}
