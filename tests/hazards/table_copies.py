"""The hazards of the tail's parts, which Redis copies from the payloads."""

import fedmoe.store.copies
import fedmoe.store.expert
import fedmoe.store.gateway
import fedmoe.store.lifecycle
from fedmoe.protocol.growth import Growth
from fedmoe.store.parts import NewWeights
from tests.hazards import copies, tails, without_copies
from tests.hazards.hazard import Hazard, of_store
from tests.protocol import broken_parts

LACKS = "the expert is damaged: its tail lacks part 0"
STAYS = "stays for ever"

OF_COPIES = {
    "H28h": Hazard(
        wrong="a worker writes other bytes under its part between its check and the commit: they are in the tail",
        rule="Redis copies a part to a key of the aggregator's before it is checked, and the copy is folded and kept",
        scenario=copies.h28_part_overwritten_before_the_commit,
        without=of_store(without_copies.CopiesAtTheCommit),
        symptom="the expert is damaged: in its tail, the update of version 1 is damaged",
    ),
    "H28i": Hazard(
        wrong="an aggregator is paused between the copy and the commit: its record names a copy that has expired",
        rule="a commit watches its copies, and checks that all of them exist",
        scenario=copies.h28_copy_expired_before_the_commit,
        without=((NewWeights, "check", lambda *_: None),),
        symptom=LACKS,
    ),
    "H28j": Hazard(
        wrong="a copy goes on expiring after the commit: a part of the expert vanishes minutes later",
        rule="the commit makes its copies permanent, in its transaction",
        scenario=copies.h28_copy_expires_after_the_commit,
        without=((NewWeights, "queue", broken_parts.makes_nothing_permanent),),
        symptom=LACKS,
    ),
    "H28k": Hazard(
        wrong="a copy has the expiry of its payload, or none: that of an aggregator which died stays for ever",
        rule="a copy gets an expiry of its own with the command that makes it",
        scenario=copies.h28_copy_of_no_commit,
        without=((fedmoe.store.copies, "COPY", without_copies.COPY_FOR_EVER),),
        symptom=STAYS,
    ),
    "H28l": Hazard(
        wrong="two aggregators copy one update to the same key; the one that is late removes what the other committed",
        rule="each attempt to decide an update has a random name for its copy",
        scenario=copies.h28_two_copies_of_one_update,
        without=(
            (Growth, "copy", without_copies.copy_of_one_name),
            (fedmoe.store.copies, "COPY", without_copies.COPY_OVER),
        ),
        symptom=LACKS,
    ),
    "H28m": Hazard(
        wrong="a rollback, or a compaction, leaves the copies of the tail that it ends",
        rule="whatever writes the weights removes the copies that the records name, in the same transaction",
        scenario=copies.h28_copies_after_a_rollback,
        without=((fedmoe.store.expert, "copied_keys", without_copies.leaves_copies),),
        symptom=STAYS,
    ),
    "H28n": Hazard(
        wrong="a compaction removes the copies, and then a rival has committed: its tail lacks them",
        rule="whatever writes the weights removes the copies in the transaction that compares meta's commit",
        scenario=tails.h28_rival_before_the_compaction,
        without=of_store(without_copies.RemovesCopiesFirst),
        symptom=LACKS,
    ),
    "H28o": Hazard(
        wrong="the weights are written while somebody reads the copies, who takes the expert for damaged",
        rule="who misses a copy reads meta again: the expert is damaged only if it still names the same tail",
        scenario=copies.h28_reader_beside_a_compaction,
        without=((fedmoe.store.gateway, "readings", without_copies.first_reading),),
        symptom=LACKS,
    ),
    "H28p": Hazard(
        wrong="a worker writes its part all the time: every commit that watches it is aborted, for all workers",
        rule="a commit watches only what aggregators write",
        scenario=copies.h28_worker_that_writes_all_the_time,
        without=of_store(without_copies.WatchesPayloads),
        symptom="one worker keeps the updates of all from being committed",
    ),
    "H28q": Hazard(
        wrong="the weights are written while an operator's command counts the copies: it calls the expert damaged",
        rule="who counts copies and misses one reads meta again, as who folds them does",
        scenario=copies.h28_operator_beside_a_compaction,
        without=((fedmoe.store.lifecycle, "readings", without_copies.first_reading),),
        symptom="the operator is told: expert 'sql_expert' in Redis is damaged: its tail has 1",
    ),
}
