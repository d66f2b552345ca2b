"""The hazards of weights that lie in several Redis strings."""

import fedmoe.store.parts
from fedmoe.protocol.records import Meta
from fedmoe.store import rollback
from fedmoe.store.parts import NewWeights
from tests.hazards import parts, without_parts
from tests.hazards.hazard import Hazard, of_store
from tests.protocol import broken_parts

OF_PARTS = {
    "H29a": Hazard(
        wrong="the parts of the weights are written in place: who reads them meanwhile gets some of each commit",
        rule="each commit writes parts of its own, which never change",
        scenario=parts.h29_reader_beside_a_commit,
        without=broken_parts.IN_PLACE,
        symptom="the expert is damaged: its weights have digests",
    ),
    "H29b": Hazard(
        wrong="a commit removes the parts while somebody reads them, who takes the expert for damaged",
        rule="who misses a part reads meta again: the expert is damaged only if it still names that part",
        scenario=parts.h29_reader_beside_a_commit,
        without=((fedmoe.store.parts, "_complete", without_parts.complete_or_not),),
        symptom="the expert is damaged: of the 2 parts of its weights",
    ),
    "H29c": Hazard(
        wrong="two aggregators write the same weights in place of the tail; the late one has the other's parts expire",
        rule="parts are named by the commit that writes them, and not by the weights that they hold",
        scenario=parts.h29_late_writer_of_the_same_weights,
        without=((Meta, "with_snapshot", broken_parts.named_by_the_weights),),
        symptom="the expert is damaged: of the 2 parts of its weights",
    ),
    "H29d": Hazard(
        wrong="an aggregator is paused between the parts and the commit: it commits parts that have expired",
        rule="a commit watches its parts, and checks that all of them exist",
        scenario=parts.h29_expired_before_the_commit,
        without=((NewWeights, "watched", ()),),
        symptom="the expert is damaged: of the 2 parts of its weights",
    ),
    "H29e": Hazard(
        wrong="a part is removed, and nobody notices until the only aggregator that retains the weights is gone",
        rule="the lease holder looks now and then whether all parts are there, and writes the expert back",
        scenario=parts.h29_part_removed,
        without=of_store(without_parts.LooksAtNoParts),
        symptom="the expert is damaged: of the 2 parts of its weights",
    ),
    "H29f": Hazard(
        wrong="a rollback writes its parts at each attempt, and each time somebody commits meanwhile: it has no end",
        rule="the parts of a rollback are written once; only its transaction is repeated",
        scenario=parts.h29_rollback_beside_a_busy_aggregator,
        without=((rollback, "parts_written", without_parts.none_written),),
        symptom="the rollback gave up",
    ),
}
