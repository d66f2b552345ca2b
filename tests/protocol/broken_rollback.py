"""The rules about an operator's rollback, taken out one by one, as in `broken`."""

from dataclasses import replace
from typing import Any

import consumers.expert
import producers.ledger
from consumers.decide import Admission, Verdict, judge_header
from fedmoe.protocol.balance import Peers
from fedmoe.protocol.layout import stamped
from fedmoe.protocol.records import Decided, Meta
from fedmoe.protocol.rollback import RolledBack
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Header
from fedmoe.store.commit import Commit
from fedmoe.store.expert import ExpertStore
from fedmoe.store.rollback import Rollback
from producers.ledger import Change
from tests.protocol.actors import Rules
from tests.protocol.broken import Broken
from tests.protocol.state import Scope


def any_base(
    header: Header, head: Decided | None, meta: Meta, spec: Spec, peers: Peers
) -> Verdict | Admission:
    """An update is accepted although its base was rolled back."""
    return judge_header(header, head, replace(meta, rolled_back=RolledBack()), spec, peers)


def nothing_is_taken_back(before: Meta, meta: Meta, change: Change) -> bool:
    """A worker keeps what it trained on weights that were rolled back."""
    return False


def only_the_base_is_taken_back(before: Meta, meta: Meta, change: Change) -> bool:
    """A worker keeps what it trained on top of an own update that was rolled back."""
    return meta.rolled_back.takes_back(before.version, before.rolled_back)


def only_the_own_update_is_taken_back(before: Meta, meta: Meta, change: Change) -> bool:
    """A worker keeps what it trained on a base that was rolled back, unless an own update was."""
    how = change.how
    return how is not None and how.how == "applied" and meta.rolled_back.holds(how.version)


def roll_back_in_place(store: ExpertStore, rollback: Rollback, **_: Any) -> Meta:
    """The weights of the earlier version, under the old commit id and version."""
    meta = store.condition().meta
    assert meta is not None
    pipe = store.connection.client.pipeline(transaction=True)
    pipe.set(store.keys.weights, stamped(rollback.to.weights, meta.weights_commit))
    pipe.hset(store.keys.meta, mapping=meta.to_hash())
    pipe.execute()
    return meta


def roll_the_version_back(store: ExpertStore, rollback: Rollback, **_: Any) -> Meta:
    """A commit that also gives the expert the number of the earlier version."""
    meta = store.condition().meta
    assert meta is not None
    ids = {"commit": rollback.commit, "weights_commit": rollback.commit}
    rolled_back = meta.rolled_back.and_also(rollback.to.version, meta.version)
    after = replace(meta, version=rollback.to.version, rolled_back=rolled_back, **ids)
    commit = Commit(on=meta.commit, generation=rollback.generation, meta=after)
    commit.weights = memoryview(rollback.weights)
    store.commit(commit)
    return after


BROKEN_ROLLBACK = {
    "H24_base_not_checked": Broken(
        what="an update is accepted although its base was rolled back",
        rules=Rules(patches=((consumers.expert, "judge_header", any_base),)),
        scope=Scope(workers=2, units=1, faults={"rollback": 1}),
        symptom="was trained on what an operator had rolled back",
    ),
    "H24_progress_is_kept": Broken(
        what="a worker keeps what it trained on weights that were rolled back",
        rules=Rules(patches=((producers.ledger, "_is_taken_back", nothing_is_taken_back),)),
        scope=Scope(faults={"rollback": 1}),
        symptom="was trained on what an operator had rolled back",
    ),
    "H24_progress_on_an_own_update_is_kept": Broken(
        what="a worker keeps what it trained on top of an own update that was rolled back",
        rules=Rules(patches=((producers.ledger, "_is_taken_back", only_the_base_is_taken_back),)),
        scope=Scope(faults={"rollback": 1}),
        symptom="was trained on what an operator had rolled back",
    ),
    "H24_progress_on_such_a_base_is_kept": Broken(
        what="a worker keeps what it trained on weights of others that were rolled back",
        rules=Rules(patches=((producers.ledger, "_is_taken_back", only_the_own_update_is_taken_back),)),
        scope=Scope(units=3, faults={"rollback": 1}),
        symptom="was trained on what an operator had rolled back",
    ),
    "H24_rolled_back_without_a_commit": Broken(
        what="the operator writes the earlier weights without a new commit id and version",
        rules=Rules(roll_back=roll_back_in_place),
        scope=Scope(units=1, faults={"rollback": 1}),
        symptom="the expert is damaged: its weights have digests",
    ),
}
