"""The hazards of a Redis that lost or holds something odd, and of what operators do to it."""

import redis.client

import consumers.aggregator as aggregator
import consumers.gateway.builder as gateway
import consumers.recovery.settle
from fedmoe.protocol import condition
from fedmoe.store import change
from fedmoe.store.expert import ExpertStore
from tests.hazards import commits, recovery, updates, without
from tests.hazards.hazard import Hazard, of_store
from tests.protocol import broken, broken_recovery

OF_REDIS = {
    "H14a": Hazard(
        wrong="after a failover the same version is another history: the gateway stays wrong",
        rule="the gateway is rebuilt unless its meta names the experts' present commit ids",
        scenario=commits.h14_built_of_another_history,
        without=((gateway, "GatewayBuilder", without.GatewayByVersion),),
        symptom="the gateway is not the merge of the experts",
    ),
    "H14b": Hazard(
        wrong="a late builder overwrites the gateway, and the present one remembers that it has built it",
        rule="a builder compares with what is in Redis, not with its memory",
        scenario=commits.h14_overwritten_by_a_late_builder,
        without=((gateway, "GatewayBuilder", without.GatewayByMemory),),
        symptom="the gateway is not the merge of the experts",
    ),
    "H15": Hazard(
        wrong="weights are read, a rival commits, meta is read: the rival's update is overwritten",
        rule="one MULTI loads weights, meta and decided",
        scenario=commits.h15_commit_between_two_reads,
        without=of_store(broken.TornLoad),
        symptom="the expert: alice's step",
    ),
    "H16": Hazard(
        wrong="an update for the old expert is applied to the one that an operator began anew",
        rule="the lineage is in the header; another one decides nothing",
        scenario=updates.h16_another_lineage,
        without=broken.BROKEN["H16_lineage_not_checked"].rules.patches,
        symptom="the expert: alice's step 0 counts 1 times",
    ),
    "H17": Hazard(
        wrong="somebody XADDs the highest id there is: no update can be published any more",
        rule="the aggregator watches last-generated-id, and makes the emptied stream anew",
        scenario=commits.h17_highest_id,
        without=of_store(without.NeverMends),
        symptom="alice's update 1 is never decided",
    ),
    "H18a": Hazard(
        wrong="a key that commits write to has another type: half of an EXEC is executed",
        rule="load looks at the types and says which key is wrong",
        scenario=commits.h18_log_of_the_wrong_type,
        without=(*of_store(without.LoadsWithoutLooking), (ExpertStore, "_check_types", lambda *_: None)),
        symptom="half of a commit was executed",
    ),
    "H18c": Hazard(
        wrong="the same while the aggregator serves: the head is not written, and the update counts twice",
        rule="a commit looks at the types after its WATCH",
        scenario=commits.h18_overwritten_while_serving,
        without=((ExpertStore, "_check_types", lambda *_: None),),
        symptom="half of a commit was executed",
    ),
    "H18b": Hazard(
        wrong="the same, if that happens between a commit's WATCH and its EXEC",
        rule="a commit WATCHes every key it writes to, not only meta",
        scenario=commits.h18_log_overwritten_before_exec,
        without=((redis.client.Pipeline, "watch", without.watch_meta_alone),),
        symptom="half of a commit was executed",
    ),
    "H19": Hazard(
        wrong="somebody removes what was decided: workers send it again, and it is applied a second time",
        rule="meta knows the decided updates by a stamp; what is not what meta knows is not served",
        scenario=recovery.h19_decisions_are_gone,
        without=((condition, "damage", lambda *_, **__: ""),),
        symptom="alice's step 0 counts 2 times",
    ),
    "H20a": Hazard(
        wrong="Redis comes back from an older file, and what a worker that has ended had published is gone",
        rule="an aggregator that retains a later commit writes it back",
        scenario=recovery.h20_older_file,
        without=((aggregator, "ExpertServer", broken_recovery.ForgetsAtErrors),),
        symptom="alice's step 1 is lost",
    ),
    "H20b": Hazard(
        wrong="the same, after another aggregator has committed on top of the older state: that commit is overwritten",
        rule="only a commit that memory passed through is written over, by a compare-and-swap",
        scenario=recovery.h20_committed_meanwhile,
        without=broken_recovery.BROKEN_RECOVERY["E9_older_version_is_written_over"].rules.patches,
        symptom="bob's step 0 is lost",
    ),
    "H20c": Hazard(
        wrong="the same, and nobody sends the undone update again",
        rule="kept updates that Redis lacks are announced again",
        scenario=recovery.h20_committed_meanwhile,
        without=((ExpertStore, "announce", lambda *_: None),),
        symptom="alice's step 0 is lost",
    ),
    "H21": Hazard(
        wrong="an operator restores an older backup, and an aggregator writes back what it retains",
        rule="memory is written back over a commit that it passed through, not over an earlier version",
        scenario=recovery.h21_restored_backup,
        without=broken_recovery.BROKEN_RECOVERY["E9_older_version_is_written_over"].rules.patches,
        symptom="alice's step 0 counts 1 times",
    ),
    "H22": Hazard(
        wrong="a worker started while Redis was behind meets a run of its own number, and stops at every start",
        rule="only a run of a later number is another process",
        scenario=recovery.h22_run_of_the_same_number,
        without=broken_recovery.BROKEN_RECOVERY["E11_number_of_a_run_counts"].rules.patches,
        symptom="alice",
    ),
    "H20d": Hazard(
        wrong="Redis comes back from before a change of the rules, and the change is lost though an aggregator knew it",
        rule="the operator's commit becomes part of the retained history, like any other",
        scenario=recovery.h20_rules_in_an_older_file,
        without=((consumers.recovery.settle, "is_change_of_rules", lambda *_: False),),
        symptom="the operator's change is lost: rules 1 are in force",
    ),
    "H23a": Hazard(
        wrong="an aggregator, in the middle of a batch, overwrites the rules that an operator has just changed",
        rule="a change of the rules is a commit: it gives the expert another commit id",
        scenario=commits.h23_rules_changed_between_two_updates,
        without=((change, "change_rules", broken.change_in_place),),
        symptom="the operator's change was overwritten",
    ),
    "H23b": Hazard(
        wrong="after a change of the rules, nobody can tell under which ones an earlier update was decided",
        rule="a line of the log names the rules of its update, and a change keeps those that ended",
        scenario=commits.h23_update_before_the_change,
        without=((change, "RulesLine", without.NoLine),),
        symptom="the log cannot be replayed",
    ),
}
