"""Every hazard: what goes wrong without which rule, the scenario that plays it, and the rule taken out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis.client

import consumers.aggregator as aggregator
import consumers.gateway as gateway
import producers.ledger as ledger
import producers.worker as worker
from consumers import decide, expert, verify
from fedmoe.store import lifecycle
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from producers.checkpoint import StateDir
from producers.ledger import Ledger
from tests.hazards import chains, commits, recovery, updates, without
from tests.hazards.world import World
from tests.protocol import broken, broken_recovery

Patch = tuple[Any, str, Any]  # what to replace: object, attribute, replacement


@dataclass(frozen=True)
class Hazard:
    """One way in which a looser protocol breaks.

    Args:
        wrong: what goes wrong without the rule.
        rule: what prevents it.
        scenario: plays it on a real server and asserts the outcome.
        without: takes exactly this rule out of the project's code.
        symptom: part of the sentence with which the scenario's own assertion then fails.
        errors: errors without a sentence that a process then meets over and over, if that is how it goes wrong.
    """

    wrong: str
    rule: str
    scenario: Callable[[World], None]
    without: tuple[Patch, ...]
    symptom: str
    errors: frozenset[str] = frozenset()


def _store(kind: type) -> tuple[Patch, ...]:
    return ((aggregator, "ExpertStore", kind),)


def _expert(kind: type) -> tuple[Patch, ...]:
    return ((aggregator, "Expert", kind),)


def _worker_store(kind: type) -> tuple[Patch, ...]:
    return ((worker, "WorkerStore", kind),)


HAZARDS = {
    "H00a": Hazard(
        wrong="the payload of a worker that was away for a week has expired, and it is told so instead of: too stale",
        rule="what is not whole decides nothing; its worker sends it again, and is refused for the true reason",
        scenario=updates.h00_away_for_a_week,
        without=_expert(without.RefusesWhatIsNotWhole),
        symptom="header is missing",
    ),
    "H00b": Hazard(
        wrong="clocks that jump change the weights",
        rule="nothing that decides or weighs an update reads a clock: staleness counts versions",
        scenario=commits.h00_clocks_run_wild,
        without=((decide, "staleness_of", without.staleness_by_the_clock),),
        symptom="clocks enter the outcome",
    ),
    "H00c": Hazard(
        wrong="an aggregator is killed with an update in its hands: lost, if its worker has left",
        rule="an entry is acknowledged and deleted by the commit that decides it, not when it is read",
        scenario=commits.h00_killed_before_the_commit,
        without=_store(broken.AckFirst),
        symptom="alice's step 0 is lost",
    ),
    "H00d": Hazard(
        wrong="a hostile XTRIM removes an entry, and its worker waits for ever",
        rule="an entry that is gone without a decision is sent again",
        scenario=updates.h00_stream_trimmed,
        without=_worker_store(broken.NoResending),
        symptom="alice's update 1 is never decided",
    ),
    "H01a": Hazard(
        wrong="two aggregators refuse the same update, the version being the same before and after",
        rule="a commit compares the commit id, which is new in every commit, refusals included",
        scenario=commits.h01_refused_twice,
        without=_store(without.CommitsByVersion),
        symptom="decided 2 times",
    ),
    "H01b": Hazard(
        wrong="version 1 of the memory and version 1 of Redis are of different histories: an update is overwritten",
        rule="a commit compares the commit id, not the version",
        scenario=commits.h01_same_version_of_another_history,
        without=_store(without.CommitsByVersion),
        symptom="the expert: bob's step 0 is lost",
    ),
    "H01c": Hazard(
        wrong="a rival commits between the comparison and EXEC: its update is overwritten",
        rule="WATCH meta before the comparison",
        scenario=commits.h01_rival_between_check_and_exec,
        without=((redis.client.Pipeline, "watch", without.watch_nothing),),
        symptom="the expert: bob's step 0 is lost",
    ),
    "H02a": Hazard(
        wrong="a failover undoes the decision of n, n+1 is accepted since its seq is higher: n is lost",
        rule="an update is decided only if its `prev` is the head `decided[worker]`",
        scenario=chains.h02_decision_lost_in_a_failover,
        without=broken.BROKEN["H2_prev_not_checked"].rules.patches,
        symptom="the expert: alice's step 0 is lost",
    ),
    "H02b": Hazard(
        wrong="somebody forges the `prev` of another worker's update: its predecessor is lost",
        rule="`prev` stands in the header under the worker's own prefix, not in the entry",
        scenario=chains.h02_forged_prev,
        without=_expert(without.TrustsEntries),
        symptom="the expert: alice's step 0 is lost",
    ),
    "H03a": Hazard(
        wrong="an entry that was read after the lease was lost hangs in the pending list for ever",
        rule="the holder of the lease reclaims now and then, not only when it loads",
        scenario=commits.h03_read_after_the_lease_was_lost,
        without=((aggregator.ExpertServer, "_is_time_to_reclaim", lambda _: False),),
        symptom="alice's update 1 is never decided",
    ),
    "H03b": Hazard(
        wrong="an entry that a dead aggregator had read is nobody's",
        rule="whoever takes the lease reclaims the whole pending list",
        scenario=commits.h03_read_and_died,
        without=_store(broken.NoReclaim),
        symptom="alice's update 1 is never decided",
    ),
    "H03c": Hazard(
        wrong="what an aggregator read before it lost its connection hangs in its own pending list",
        rule="it reclaims its own entries too, with min-idle 0",
        scenario=commits.h03_read_and_lost_the_connection,
        without=_store(without.ReclaimsWhatIsIdle),
        symptom="alice's update 1 is never decided",
    ),
    "H04a": Hazard(
        wrong="a failover undoes more decisions than the worker keeps updates: the oldest is lost",
        rule="every update that was decided less than a minute ago is kept",
        scenario=chains.h04_two_decisions_lost,
        without=((Ledger, "_forget", without.forget_all_but_the_last),),
        symptom="alice's step 0 is lost",
    ),
    "H04b": Hazard(
        wrong="a failover goes back further than what is kept: no update has the right `prev` any more",
        rule="the oldest update that is kept takes the head for its `prev`, and the loss is said",
        scenario=chains.h04_more_lost_than_kept,
        without=((Ledger, "_roll_back", without.roll_back_with_old_prev),),
        symptom="is never decided",
    ),
    "H05a": Hazard(
        wrong="a killed worker cuts the same (run, seq) anew with more data: a duplicate, the extra is lost",
        rule="outbox, optimizer and data position are on disk before XADD",
        scenario=chains.h05_made_anew,
        without=((worker, "Sync", without.SavesWhenDecided),),
        symptom="alice's step 2 is lost",
    ),
    "H05b": Hazard(
        wrong="a killed worker trains the same data once more as a new run: counted twice",
        rule="outbox and data position are on disk before XADD, and the run goes on",
        scenario=chains.h05_trained_twice,
        without=((worker, "Sync", without.SavesWhenDecided), (StateDir, "load", without.load_as_new_run)),
        symptom="alice's step 1 counts 2 times",
    ),
    "H05c": Hazard(
        wrong="a worker is killed, then a failover undoes its last decision: lost",
        rule="decided updates that are kept are in the checkpoint too",
        scenario=chains.h05_killed_before_a_failover,
        without=((StateDir, "save", without.save_without_kept),),
        symptom="alice's step 0 is lost",
    ),
    "H05d": Hazard(
        wrong="a worker whose old checkpoint was restored sends again what later updates follow: counted twice",
        rule="an update of its own run in `decided` that it does not know is adopted; pending and progress are dropped",
        scenario=chains.h05_old_checkpoint,
        without=((ledger, "locate", without.never_ahead),),
        symptom="alice's step 0 counts 2 times",
    ),
    "H05e": Hazard(
        wrong="a worker whose old checkpoint was restored trains again on data that is in the expert",
        rule="it goes to the data position that is recorded in `decided`",
        scenario=chains.h05_old_checkpoint,
        without=((Ledger, "_start_over", without.start_over_in_place),),
        symptom="alice's step 1 counts 2 times",
    ),
    "H06a": Hazard(
        wrong="after a failover the same version is another history: the worker trains on weights that never were",
        rule="a pull compares commit ids, not versions",
        scenario=chains.h06_same_version_of_another_history,
        without=_worker_store(broken.PullByVersion),
        symptom="the local adapter of alice: alice's step 0 counts 2 times",
    ),
    "H06b": Hazard(
        wrong="after a failover the version is lower, and the worker keeps what was undone and what it sends again",
        rule="a pull compares commit ids, not: is the version higher",
        scenario=chains.h06_older_version,
        without=_worker_store(without.PullsIfNewer),
        symptom="the local adapter of alice: alice's step 0 counts 2 times",
    ),
    "H06c": Hazard(
        wrong="the decision is read after the weights: the update is neither in these nor pending",
        rule="one MULTI reads weights, meta and the worker's own decision",
        scenario=chains.h06_commit_between_two_reads,
        without=_worker_store(broken.TornPull),
        symptom="the local adapter of alice: ",
    ),
    "H06d": Hazard(
        wrong="a decided update that a failover undid is nobody's",
        rule="on a rollback the updates that are kept go back into pending",
        scenario=chains.h06_idle_during_a_failover,
        without=((Ledger, "_advance", without.advance_without_resending),),
        symptom="alice's step 0 is lost",
    ),
    "H07a": Hazard(
        wrong="a late XADD of an old run's update, long decided, is accepted: counted twice",
        rule="its `prev` is not the head",
        scenario=chains.h07_late_update_of_an_old_run,
        without=broken.BROKEN["H2_prev_not_checked"].rules.patches,
        symptom="the expert: alice's step 0 counts 2 times",
    ),
    "H07b": Hazard(
        wrong="a second process takes the first one's decision for its own: its update is lost",
        rule="always match (run, seq), never seq alone",
        scenario=chains.h07_two_processes_of_one_name,
        without=((ledger, "locate", without.locate_by_seq),),
        symptom="alice's step 1 is lost",
    ),
    "H07c": Hazard(
        wrong="a worker without a state directory starts again under the same run: two contents of one (run, seq)",
        rule="a new run, <incarnation>-<nonce>, at each start without a state directory",
        scenario=chains.h07_killed_without_a_state_directory,
        without=((worker, "make_run", without.one_run),),
        symptom="alice's step 0 is lost",
    ),
    "H07d": Hazard(
        wrong="two processes of one name take each other's decisions for rollbacks and send again: counted twice",
        rule="an update of a later run in `decided` means: another process bears this name; stop and say so",
        scenario=chains.h07_the_older_twin_stops,
        without=((ledger, "locate", without.never_foreign),),
        symptom="alice's step 0 counts 2 times",
    ),
    "H07e": Hazard(
        wrong="the first update of a worker's next run is taken for a duplicate of its last run's first",
        rule="a duplicate is one of the same (run, seq)",
        scenario=chains.h07_seq_begins_again,
        without=((expert, "judge_header", without.judge_by_seq),),
        symptom="alice's update 1 is never decided",
    ),
    "H08a": Hazard(
        wrong="a good update is burned because header or part expired or is damaged",
        rule="what is not whole decides nothing, and is sent again",
        scenario=updates.h08_payload_expired,
        without=_expert(without.RefusesWhatIsNotWhole),
        symptom="the expert: alice's step 0 is lost",
    ),
    "H08b": Hazard(
        wrong="a stranger rings for an update that is not written yet, and burns it",
        rule="what is not whole decides nothing",
        scenario=updates.h08_rung_by_a_stranger,
        without=_expert(without.RefusesWhatIsNotWhole),
        symptom="the expert: alice's step 0 is lost",
    ),
    "H08c": Hazard(
        wrong="a failover between SET and XADD burns the update",
        rule="what is not whole decides nothing, and is sent again",
        scenario=updates.h08_failover_between_set_and_xadd,
        without=_expert(without.RefusesWhatIsNotWhole),
        symptom="the expert: alice's step 0 is lost",
    ),
    "H08d": Hazard(
        wrong="an entry says that a stale update is fresh, and it weighs too much",
        rule="all that matters is in the header; the entry only rings the bell",
        scenario=updates.h08_forged_base_version,
        without=_expert(without.TrustsEntries),
        symptom="the expert: alice's step 0 counts 1 times",
    ),
    "H09": Hazard(
        wrong="an aggregator with stale memory takes off every update that a worker sends: endless resending",
        rule="every removal goes through a commit, also of duplicates and of what is undecidable",
        scenario=commits.h09_removed_from_stale_memory,
        without=(*_expert(broken.BareRemoval), *_store(broken.NeverCompares)),
        symptom="alice's update 2 is never decided",
    ),
    "H10": Hazard(
        wrong="a duplicate overwrites how the first was decided: a refused worker is never told",
        rule="duplicates never write `decided`",
        scenario=updates.h10_duplicate_of_a_refusal,
        without=_expert(broken.DuplicateDecides),
        symptom="bob was never told",
    ),
    "H11a": Hazard(
        wrong="after a failover an entry id is given again; a commit of before deletes the new entry unseen: lost",
        rule="load again whenever the connection was opened again (count connections; redis-py reconnects silently)",
        scenario=commits.h11_entry_id_given_twice,
        without=((Connection, "_on_connect", without.connect_uncounted),),
        symptom="the expert: bob's step 0 is lost",
    ),
    "H11b": Hazard(
        wrong="the parts went to the old master, XADD to the new one, and the worker left: lost",
        rule="XADD goes into one MULTI with the STRLEN of each part; a wrong length means: publish again",
        scenario=updates.h11_parts_on_the_old_master,
        without=_worker_store(without.PublishesUnchecked),
        symptom="the expert: bob's step 0 is lost",
    ),
    "H11c": Hazard(
        wrong="a worker left when its last update was published, and a failover drops that: lost",
        rule="a worker leaves when its last update is decided",
        scenario=updates.h11_left_before_the_decision,
        without=((worker, "Sync", without.LeavesOncePublished),),
        symptom="the expert: bob's step 0 is lost",
    ),
    "H12": Hazard(
        wrong="the consumer group is made again at $: what waited is never read",
        rule="the group always starts at 0",
        scenario=commits.h12_group_was_lost,
        without=_store(without.GroupFromTheEnd),
        symptom="alice's update 1 is never decided",
    ),
    "H13a": Hazard(
        wrong="after a rollback base_version is above the version: the decay of a negative staleness",
        rule="staleness = max(0, version - base_version)",
        scenario=updates.h13_base_of_the_future,
        without=broken.BROKEN["H13_negative_staleness"].rules.patches,
        symptom="alice's update 1 is never decided",
        errors=frozenset({"staleness cannot be negative, got -1"}),
    ),
    "H13b": Hazard(
        wrong="the same in `verify`: an honest log is called wrong",
        rule="staleness = max(0, version - base_version), also in the replay",
        scenario=updates.h13_base_of_the_future,
        without=((verify, "staleness_of", int.__sub__),),
        symptom="the log cannot be replayed: version 1: staleness",
    ),
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
        without=_store(broken.TornLoad),
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
        without=_store(without.NeverMends),
        symptom="alice's update 1 is never decided",
    ),
    "H18a": Hazard(
        wrong="a key that commits write to has another type: half of an EXEC is executed",
        rule="load looks at the types and says which key is wrong",
        scenario=commits.h18_log_of_the_wrong_type,
        without=(*_store(without.LoadsWithoutLooking), (ExpertStore, "_check_types", lambda *_: None)),
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
        without=((lifecycle, "damage", lambda *_, **__: ""),),
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
}
