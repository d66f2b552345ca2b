"""The hazards of a Redis that lost data or holds unexpected data, and of operators' changes to it."""

import redis.client

import consumers.aggregator as aggregator
import consumers.compaction
import consumers.early_warning
import consumers.gateway.builder as gateway
import consumers.recovery.settle
from consumers.expert import Expert
from fedmoe.protocol import condition, keys
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.tail import TailRecord
from fedmoe.store import change, rollback
from fedmoe.store.expert import ExpertStore
from producers.ledger import Ledger
from tests.hazards import commits, gateways, holds, recovery, rollbacks, tails, updates, vectors, without
from tests.hazards.hazard import Hazard, of_store
from tests.protocol import broken, broken_recovery, broken_rollback, broken_tail

OF_REDIS = {
    "H14a": Hazard(
        wrong="after a failover the same version belongs to another history: the gateway stays outdated",
        rule="the gateway is rebuilt unless its meta names the present commit ids of the experts",
        scenario=gateways.h14_built_of_another_history,
        without=((gateway, "GatewayBuilder", without.GatewayByVersion),),
        symptom="the gateway is not the merge of the experts",
    ),
    "H14b": Hazard(
        wrong="a late builder overwrites the gateway, and the present builder believes that its own is still there",
        rule="a builder compares with the gateway in Redis, not with its memory",
        scenario=gateways.h14_overwritten_by_a_late_builder,
        without=((gateway, "GatewayBuilder", without.GatewayByMemory),),
        symptom="the gateway is not the merge of the experts",
    ),
    "H14c": Hazard(
        wrong="the merge of the experts is written where the trained gateway lies: all that was trained is lost",
        rule="whatever merges writes only keys of its own, never those of an expert",
        scenario=gateways.h14_merged_beside_the_trained,
        without=((keys.Keys, "merged", property(lambda self: self.expert(GATEWAY))),),
        symptom="the merge overwrote the trained gateway",
    ),
    "H15": Hazard(
        wrong="a rival commits between the reads of weights and meta: the rival's update is overwritten",
        rule="one MULTI loads weights, meta and `decided`",
        scenario=commits.h15_commit_between_two_reads,
        without=of_store(broken.TornLoad),
        symptom="the expert: alice's step",
    ),
    "H16": Hazard(
        wrong="an update for the old expert is applied to the expert that an operator created again",
        rule="the header names the lineage; an update of another lineage is undecidable",
        scenario=updates.h16_another_lineage,
        without=broken.BROKEN["H16_lineage_not_checked"].rules.patches,
        symptom="the expert: alice's step 0 counts 1 times",
    ),
    "H17": Hazard(
        wrong="somebody XADDs an entry with the highest possible id: no update can be published any more",
        rule="the aggregator watches last-generated-id, and recreates the emptied stream",
        scenario=commits.h17_highest_id,
        without=of_store(without.NeverMends),
        symptom="alice's update 1 is never decided",
    ),
    "H18a": Hazard(
        wrong="a key that commits write has a wrong type: half of an EXEC is executed",
        rule="a load checks the types and reports the key that is wrong",
        scenario=commits.h18_log_of_the_wrong_type,
        without=(
            *of_store(without.LoadsWithoutLooking),
            (ExpertStore, "_check_types", lambda *_, **__: None),
        ),
        symptom="half of a commit was executed",
    ),
    "H18c": Hazard(
        wrong="the same while the aggregator serves: the head is not written, and the update counts twice",
        rule="a commit checks the types after its WATCH",
        scenario=commits.h18_overwritten_while_serving,
        without=((ExpertStore, "_check_types", lambda *_, **__: None),),
        symptom="half of a commit was executed",
    ),
    "H18b": Hazard(
        wrong="the same, if the type changes between the WATCH and the EXEC of a commit",
        rule="a commit WATCHes every key that it writes, not only meta",
        scenario=commits.h18_log_overwritten_before_exec,
        without=((redis.client.Pipeline, "watch", without.watch_meta_alone),),
        symptom="half of a commit was executed",
    ),
    "H19": Hazard(
        wrong="somebody removes the hash `decided`: workers resend their updates, which are applied a second time",
        rule="meta holds a stamp of `decided`; an expert with a part that does not match its stamp is not served",
        scenario=recovery.h19_decisions_are_gone,
        without=((condition, "damage", lambda *_, **__: ""),),
        symptom="alice's step 0 counts 2 times",
    ),
    "H20a": Hazard(
        wrong="Redis comes back from an older file: an update is lost whose worker has ended",
        rule="an aggregator that retains a later commit writes it back",
        scenario=recovery.h20_older_file,
        without=((aggregator, "ExpertServer", broken_recovery.ForgetsAtErrors),),
        symptom="alice's step 1 is lost",
    ),
    "H20b": Hazard(
        wrong="the same, after another aggregator committed on top of the older state: that commit is overwritten",
        rule="a compare-and-swap overwrites only a commit that the retained state passed through",
        scenario=recovery.h20_committed_meanwhile,
        without=broken_recovery.BROKEN_RECOVERY["E9_older_version_is_written_over"].rules.patches,
        symptom="bob's step 0 is lost",
    ),
    "H20c": Hazard(
        wrong="the same, and nobody resends the undone update",
        rule="an aggregator announces its kept updates again if Redis lacks them",
        scenario=recovery.h20_committed_meanwhile,
        without=((ExpertStore, "announce", lambda *_: None),),
        symptom="alice's step 0 is lost",
    ),
    "H21": Hazard(
        wrong="an operator restores an older backup, and an aggregator overwrites it with its retained state",
        rule="retained state replaces a commit that it passed through, not every earlier version",
        scenario=recovery.h21_restored_backup,
        without=broken_recovery.BROKEN_RECOVERY["E9_older_version_is_written_over"].rules.patches,
        symptom="alice's step 0 counts 1 times",
    ),
    "H22": Hazard(
        wrong="a worker started while Redis was behind finds another run of its incarnation, and stops at every start",
        rule="only a run of a higher incarnation is another process",
        scenario=recovery.h22_run_of_the_same_number,
        without=broken_recovery.BROKEN_RECOVERY["E11_number_of_a_run_counts"].rules.patches,
        symptom="alice",
    ),
    "H20d": Hazard(
        wrong="Redis comes back from before a change of rules: the change is lost though an aggregator knew it",
        rule="an operator's commit becomes part of the retained history, like any other commit",
        scenario=recovery.h20_rules_in_an_older_file,
        without=((consumers.recovery.settle, "is_change_of_rules", lambda *_: False),),
        symptom="the operator's change is lost: rules 1 are in force",
    ),
    "H23a": Hazard(
        wrong="an aggregator in the middle of a batch goes on by the rules that an operator has just changed",
        rule="a change of rules is a commit: it gives the expert a new commit id",
        scenario=commits.h23_rules_changed_between_two_updates,
        without=((change, "change_rules", broken.change_in_place),),
        symptom="the log names rules [b'1', b'1']",
    ),
    "H23b": Hazard(
        wrong="after a change of rules, nobody can tell under which rules an earlier update was decided",
        rule="a log line names the rules of its update, and the log line of a change keeps the previous rules",
        scenario=commits.h23_update_before_the_change,
        without=((change, "RulesLine", without.NoLine),),
        symptom="the log cannot be replayed",
    ),
    "H24a": Hazard(
        wrong="an update unlearns a bad step that an operator has taken back by now: it is taken back a second time",
        rule="an update whose base was rolled back is refused",
        scenario=rollbacks.h24_update_in_flight,
        without=broken_rollback.BROKEN_ROLLBACK["H24_base_not_checked"].rules.patches,
        symptom="the expert: alice's step 0 counts -1 times",
    ),
    "H24b": Hazard(
        wrong="the same, by training that was in no update yet and travels with a newer base",
        rule="a worker drops what it trained on weights that were rolled back",
        scenario=rollbacks.h24_progress,
        without=broken_rollback.BROKEN_ROLLBACK["H24_progress_is_kept"].rules.patches,
        symptom="the expert: alice's step 0 counts -1 times",
    ),
    "H24c": Hazard(
        wrong="the same, where the bad step was the worker's own, applied and taken back before the worker knew",
        rule="a worker drops what it trained on top of an own update that was rolled back",
        scenario=rollbacks.h24_own_update,
        without=broken_rollback.BROKEN_ROLLBACK["H24_progress_on_an_own_update_is_kept"].rules.patches,
        symptom="the expert: alice's step 0 counts -1 times",
    ),
    "H24d": Hazard(
        wrong="an aggregator commits a batch on top of the weights that an operator has just taken back",
        rule="a rollback is a commit: it gives the expert a new commit id",
        scenario=rollbacks.h24_between_decision_and_commit,
        without=((rollback, "roll_back", broken_rollback.roll_back_in_place),),
        symptom="the expert: alice's step 0 counts 1 times",
    ),
    "H24e": Hazard(
        wrong="the version goes back: later versions get the numbers of rolled-back ones, and good updates are refused",
        rule="a rollback is a new version; versions never go back",
        scenario=rollbacks.h24_number_used_twice,
        without=((rollback, "roll_back", broken_rollback.roll_the_version_back),),
        symptom="the expert: carol's step 1 is lost",
    ),
    "H24f": Hazard(
        wrong="Redis comes back from before a rollback: the rollback is lost though an aggregator knew it",
        rule="an operator's rollback becomes part of the retained history, like any other commit",
        scenario=rollbacks.h24_older_file,
        without=((consumers.recovery.settle, "rollback_of", lambda *_: None),),
        symptom="the operator's rollback is lost",
    ),
    "H25a": Hazard(
        wrong="an aggregator is killed between writing the server state and the weights: the momentum is gone",
        rule="the server state is part of the commit that changes the weights",
        scenario=commits.h25_killed_beside_the_state,
        without=of_store(broken.StateBesideTheCommit),
        symptom="the server optimizer began anew",
    ),
    "H25b": Hazard(
        wrong="an emptied Redis is written back without the server state: the momentum is gone",
        rule="a write-back writes the retained server state with the retained weights",
        scenario=commits.h25_emptied,
        without=of_store(without.WritesBackWeightsAlone),
        symptom="the server optimizer began anew",
    ),
    "H26a": Hazard(
        wrong="a worker claims that the validation loss got worse, and the expert stands still for all others",
        rule="an expert is held only if two workers agree, each compared with itself",
        scenario=holds.h26_one_forged_loss,
        without=((consumers.early_warning, "AGREEING", 1),),
        symptom="one forged loss holds the expert",
    ),
    "H26b": Hazard(
        wrong="an expert is held, and updates that were read with the one that held it, or wait, are applied to it",
        rule="the rules in force are looked at before each update, and what waits stays on the stream",
        scenario=holds.h26_batch_goes_on,
        without=((Expert, "is_held", False),),
        symptom="an update was applied after the one that held the expert",
    ),
    "H26c": Hazard(
        wrong="an operator goes back to an earlier version, and the expert is held, as it is worse than what is gone",
        rule="a worker's losses are compared with those that it measured since the last release or rollback",
        scenario=holds.h26_going_back,
        without=((consumers.early_warning, "counts_since", without.counts_since_the_release),),
        symptom="the expert is held for what an operator went back to",
    ),
    "H27a": Hazard(
        wrong="Redis is emptied, and no worker sends its domain vector again: nothing is routed to the expert any more",
        rule="an aggregator retains the vectors, and writes them back with the expert",
        scenario=vectors.h27_vector_in_an_emptied_redis,
        without=of_store(broken_recovery.ForgetsVectors),
        symptom="alice's domain vector is lost",
    ),
    "H27b": Hazard(
        wrong="the update that brings a worker's domain vector is refused, and no other one brings it",
        rule="a worker's updates bring its vector until one of them is applied",
        scenario=vectors.h27_vector_of_a_refused_update,
        without=((Ledger, "make_update", without.make_update_and_forget_the_vector),),
        symptom="alice's domain vector is lost",
    ),
    "H28a": Hazard(
        wrong="somebody puts back the weights of another moment: the tail is folded onto them, and more is committed",
        rule="meta names the commit of the weights, the last record of the tail, and the digest of what both give",
        scenario=tails.h28_weights_of_another_moment,
        without=(*without.NO_COMPARISON, (ExpertStore, "is_unchanged", lambda *_, **__: True)),
        symptom="was committed to although its parts do not belong together",
    ),
    "H28b": Hazard(
        wrong="a record of the tail is overwritten by one of another version: its update is lost, another counts twice",
        rule="each record of the tail names the record before it by its digest, and meta names the last one",
        scenario=tails.h28_tail_of_another_history,
        without=without.NO_COMPARISON,
        symptom="was committed to although its parts do not belong together",
    ),
    "H28c": Hazard(
        wrong="a value of the weights is overwritten: the next aggregator loads it and commits on top of it",
        rule="each commit that changes the weights stores their digest, and a reader compares it",
        scenario=tails.h28_value_changed_by_hand,
        without=without.NO_DIGESTS,
        symptom="was committed to although its parts do not belong together",
    ),
    "H28d": Hazard(
        wrong="a part of the tail is removed, and nobody notices until the only aggregator that retains it is gone",
        rule="the lease holder looks now and then whether the tail is whole, and writes the expert back",
        scenario=tails.h28_part_removed,
        without=of_store(without.LooksAtNoTail),
        symptom="the expert is damaged: its tail lacks part 0 of the update of version 2",
    ),
    "H28e": Hazard(
        wrong="a rival commits before an aggregator writes the weights: its update is overwritten",
        rule="writing the weights in place of the tail is a commit: it compares meta's commit, and has a new id",
        scenario=tails.h28_rival_before_the_compaction,
        without=((consumers.compaction, "compact", without.compact_without_comparing),),
        symptom="the expert is damaged: its hash of decided updates",
    ),
    "H28f": Hazard(
        wrong="an operator rolls an expert back, and the tail is folded onto the weights of the earlier version",
        rule="whatever writes the weights removes the tail, and meta names none, in the same transaction",
        scenario=tails.h28_rolled_back,
        without=broken_tail.KEEPS_TAIL,
        symptom="the expert is damaged: its weights belong to commit",
    ),
    "H28g": Hazard(
        wrong="the rules change after an update: a reader folds the tail under the new rules and gets other weights",
        rule="a record of the tail holds all that its step depends on",
        scenario=tails.h28_rules_changed,
        without=((TailRecord, "of", without.record_without_momentum),),
        symptom="the expert is damaged: its weights have digests",
    ),
}
