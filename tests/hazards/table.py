"""Every hazard: what goes wrong without its rule, the rule, the scenario, and how the rule is taken out."""

import redis.client

import consumers.aggregator as aggregator
import producers.ledger as ledger
import producers.membership as membership
from consumers import decide, expert, verify
from fedmoe.store.connection import Connection
from producers.checkpoint import StateDir
from producers.ledger import Ledger
from tests.hazards import chains, commits, updates, without
from tests.hazards.hazard import Hazard, of_expert, of_store, of_worker_store
from tests.hazards.table_copies import OF_COPIES
from tests.hazards.table_parts import OF_PARTS
from tests.hazards.table_redis import OF_REDIS
from tests.protocol import broken

HAZARDS = {
    "H00a": Hazard(
        wrong="the payload of a worker that was away for a week has expired; the refusal names that, not the staleness",
        rule="an incomplete update is undecidable; its worker resends it, and it is refused for the true reason",
        scenario=updates.h00_away_for_a_week,
        without=of_expert(without.RefusesWhatIsNotWhole),
        symptom="header is missing",
    ),
    "H00b": Hazard(
        wrong="clocks that jump change the weights",
        rule="the decision and the factor of an update depend on no clock: staleness counts versions",
        scenario=commits.h00_clocks_run_wild,
        without=((decide, "staleness_of", without.staleness_by_the_clock),),
        symptom="clocks enter the outcome",
    ),
    "H00c": Hazard(
        wrong="an aggregator is killed after it read an update: the update is lost if its worker has left",
        rule="an entry is acknowledged and deleted by the commit that decides it, not when it is read",
        scenario=commits.h00_killed_before_the_commit,
        without=of_store(broken.AckFirst),
        symptom="alice's step 0 is lost",
    ),
    "H00d": Hazard(
        wrong="a hostile XTRIM removes an entry, and its worker waits for ever",
        rule="a worker resends an update whose entry is gone without a decision",
        scenario=updates.h00_stream_trimmed,
        without=of_worker_store(broken.NoResending),
        symptom="alice's update 1 is never decided",
    ),
    "H01a": Hazard(
        wrong="two aggregators refuse the same update, because a refusal leaves the version as it was",
        rule="a commit compares the commit id, which every commit renews, also one that only refuses",
        scenario=commits.h01_refused_twice,
        without=of_store(without.CommitsByVersion),
        symptom="decided 2 times",
    ),
    "H01b": Hazard(
        wrong="version 1 in memory and version 1 in Redis belong to different histories: an update is overwritten",
        rule="a commit compares the commit id, not the version",
        scenario=commits.h01_same_version_of_another_history,
        without=of_store(without.CommitsByVersion),
        symptom="the expert: bob's step 0 is lost",
    ),
    "H01c": Hazard(
        wrong="a rival aggregator commits between the comparison and EXEC: its update is overwritten",
        rule="a commit WATCHes meta before it compares the commit id",
        scenario=commits.h01_rival_between_check_and_exec,
        without=((redis.client.Pipeline, "watch", without.watch_nothing),),
        symptom="the expert: bob's step 0 is lost",
    ),
    "H02a": Hazard(
        wrong="a failover undoes the decision of n, and n+1 is accepted because its seq is higher: n is lost",
        rule="an update is decided only if its `prev` is the head `decided[worker]`",
        scenario=chains.h02_decision_lost_in_a_failover,
        without=broken.BROKEN["H2_prev_not_checked"].rules.patches,
        symptom="the expert: alice's step 0 is lost",
    ),
    "H02b": Hazard(
        wrong="somebody forges the `prev` of another worker's update: its predecessor is lost",
        rule="`prev` is in the header, under the worker's own key prefix, not in the entry",
        scenario=chains.h02_forged_prev,
        without=of_expert(without.TrustsEntries),
        symptom="the expert: alice's step 0 is lost",
    ),
    "H03a": Hazard(
        wrong="an aggregator reads an entry after it lost the lease: the entry stays in the pending list for ever",
        rule="the lease holder reclaims pending entries periodically, not only when it loads",
        scenario=commits.h03_read_after_the_lease_was_lost,
        without=((aggregator.ExpertServer, "is_time_to_reclaim", lambda _: False),),
        symptom="alice's update 1 is never decided",
    ),
    "H03b": Hazard(
        wrong="no aggregator decides an entry that a dead aggregator had read",
        rule="an aggregator that takes the lease reclaims the whole pending list",
        scenario=commits.h03_read_and_died,
        without=of_store(broken.NoReclaim),
        symptom="alice's update 1 is never decided",
    ),
    "H03c": Hazard(
        wrong="entries that an aggregator read before it lost its connection stay in its own pending list",
        rule="an aggregator also reclaims its own entries, with min-idle 0",
        scenario=commits.h03_read_and_lost_the_connection,
        without=of_store(without.ReclaimsWhatIsIdle),
        symptom="alice's update 1 is never decided",
    ),
    "H04a": Hazard(
        wrong="a failover undoes more decisions than the worker keeps updates: the oldest update is lost",
        rule="a worker keeps every update that was decided less than a minute ago",
        scenario=chains.h04_two_decisions_lost,
        without=((Ledger, "_forget", without.forget_all_but_the_last),),
        symptom="alice's step 0 is lost",
    ),
    "H04b": Hazard(
        wrong="a failover undoes decisions that the worker no longer keeps: no update has the head as its `prev`",
        rule="the oldest kept update takes the head as its `prev`, and the worker reports the loss",
        scenario=chains.h04_more_lost_than_kept,
        without=((Ledger, "_roll_back", without.roll_back_with_old_prev),),
        symptom="is never decided",
    ),
    "H05a": Hazard(
        wrong="a restarted worker makes the same (run, seq) again, with more data: a duplicate, and that data is lost",
        rule="outbox, optimizer state and data position are on disk before XADD",
        scenario=chains.h05_made_anew,
        without=((membership, "Sync", without.SavesWhenDecided),),
        symptom="alice's step 2 is lost",
    ),
    "H05b": Hazard(
        wrong="a restarted worker trains the same data again in a new run: the data counts twice",
        rule="outbox and data position are on disk before XADD, and a restart continues the run",
        scenario=chains.h05_trained_twice,
        without=((membership, "Sync", without.SavesWhenDecided), (StateDir, "load", without.load_as_new_run)),
        symptom="alice's step 1 counts 2 times",
    ),
    "H05c": Hazard(
        wrong="a worker is killed, then a failover undoes its last decision: the update is lost",
        rule="the checkpoint also holds the kept decided updates",
        scenario=chains.h05_killed_before_a_failover,
        without=((StateDir, "save", without.save_without_kept),),
        symptom="alice's step 0 is lost",
    ),
    "H05d": Hazard(
        wrong="a worker with an old checkpoint restored resends an update that was decided: it counts twice",
        rule="a worker adopts an unknown later update of its own run in `decided`, and drops pending and progress",
        scenario=chains.h05_old_checkpoint,
        without=((ledger, "locate", without.never_ahead),),
        symptom="alice's step 0 counts 2 times",
    ),
    "H05e": Hazard(
        wrong="a worker with an old checkpoint restored trains again on data that is already in the expert",
        rule="the worker moves to the data position that `decided` records",
        scenario=chains.h05_old_checkpoint,
        without=((Ledger, "_start_over", without.start_over_in_place),),
        symptom="alice's step 1 counts 2 times",
    ),
    "H06a": Hazard(
        wrong="after a failover the same version is another history: the worker trains on weights that never existed",
        rule="a pull compares commit ids, not versions",
        scenario=chains.h06_same_version_of_another_history,
        without=broken.BROKEN["H6_pull_by_version"].rules.patches,
        symptom="the local adapter of alice: alice's step 0 counts 2 times",
    ),
    "H06b": Hazard(
        wrong="after a failover the version is lower: the worker keeps undone updates in its weights and resends them",
        rule="a pull compares commit ids, and does not ask for a higher version",
        scenario=chains.h06_older_version,
        without=broken.pulling(without.pull_if_newer),
        symptom="the local adapter of alice: alice's step 0 counts 2 times",
    ),
    "H06c": Hazard(
        wrong="the decision is read after the weights: the update is neither in the weights nor in pending",
        rule="one MULTI reads weights, meta and the worker's own decision",
        scenario=chains.h06_commit_between_two_reads,
        without=broken.BROKEN["H6_pull_as_two_reads"].rules.patches,
        symptom="the local adapter of alice: ",
    ),
    "H06d": Hazard(
        wrong="nobody resends a decided update that a failover undid",
        rule="after a rollback the kept updates become pending again",
        scenario=chains.h06_idle_during_a_failover,
        without=((Ledger, "_advance", without.advance_without_resending),),
        symptom="alice's step 0 is lost",
    ),
    "H07a": Hazard(
        wrong="a late XADD of an old run's update, decided long ago, is accepted: the update counts twice",
        rule="an update whose `prev` is not the head is undecidable",
        scenario=chains.h07_late_update_of_an_old_run,
        without=broken.BROKEN["H2_prev_not_checked"].rules.patches,
        symptom="the expert: alice's step 0 counts 2 times",
    ),
    "H07b": Hazard(
        wrong="a second process of the same name mistakes the first one's decision for its own: its update is lost",
        rule="updates are matched by (run, seq), never by seq alone",
        scenario=chains.h07_two_processes_of_one_name,
        without=((ledger, "locate", without.locate_by_seq),),
        symptom="alice's step 1 is lost",
    ),
    "H07c": Hazard(
        wrong="a worker without a state directory restarts under the same run: one (run, seq) names two updates",
        rule="each start without a state directory begins a new run, <incarnation>-<nonce>",
        scenario=chains.h07_killed_without_a_state_directory,
        without=((membership, "make_run", without.one_run),),
        symptom="alice's step 0 is lost",
    ),
    "H07d": Hazard(
        wrong="two processes of one name mistake each other's decisions for rollbacks and resend: updates count twice",
        rule="a worker that finds a later run in `decided` stops and reports another process of its name",
        scenario=chains.h07_the_older_twin_stops,
        without=((ledger, "locate", without.never_foreign),),
        symptom="alice's step 0 counts 2 times",
    ),
    "H07e": Hazard(
        wrong="the first update of a new run is mistaken for a duplicate of the first update of the last run",
        rule="a duplicate has the same (run, seq)",
        scenario=chains.h07_seq_begins_again,
        without=((expert, "judge_header", without.judge_by_seq),),
        symptom="alice's update 1 is never decided",
    ),
    "H08a": Hazard(
        wrong="a good update is refused for ever because its header or a part has expired or is damaged",
        rule="an incomplete update is undecidable, and its worker resends it",
        scenario=updates.h08_payload_expired,
        without=of_expert(without.RefusesWhatIsNotWhole),
        symptom="the expert: alice's step 0 is lost",
    ),
    "H08b": Hazard(
        wrong="a stranger announces an update that is not written yet, and it is refused for ever",
        rule="an incomplete update is undecidable",
        scenario=updates.h08_rung_by_a_stranger,
        without=of_expert(without.RefusesWhatIsNotWhole),
        symptom="the expert: alice's step 0 is lost",
    ),
    "H08c": Hazard(
        wrong="after a failover between SET and XADD the update is refused for ever",
        rule="an incomplete update is undecidable, and its worker resends it",
        scenario=updates.h08_failover_between_set_and_xadd,
        without=of_expert(without.RefusesWhatIsNotWhole),
        symptom="the expert: alice's step 0 is lost",
    ),
    "H08d": Hazard(
        wrong="a forged entry calls a stale update fresh, and the update weighs too much",
        rule="only the header counts; the entry just announces the update",
        scenario=updates.h08_forged_base_version,
        without=of_expert(without.TrustsEntries),
        symptom="the expert: alice's step 0 counts 1 times",
    ),
    "H09": Hazard(
        wrong="an aggregator with stale memory removes every update of a worker from the stream: endless resends",
        rule="every removal of an entry is part of a commit, also that of a duplicate or an undecidable update",
        scenario=commits.h09_removed_from_stale_memory,
        without=(*of_expert(broken.BareRemoval), *of_store(broken.NeverCompares)),
        symptom="alice's update 2 is never decided",
    ),
    "H10": Hazard(
        wrong="a duplicate overwrites the decision: the worker never learns that its update was refused",
        rule="a duplicate never writes `decided`",
        scenario=updates.h10_duplicate_of_a_refusal,
        without=of_expert(broken.DuplicateDecides),
        symptom="bob was never told",
    ),
    "H11a": Hazard(
        wrong="after a failover an entry id is reused, and an older commit deletes the new entry unread: it is lost",
        rule="an aggregator loads again after every reconnection (it counts them: redis-py reconnects silently)",
        scenario=commits.h11_entry_id_given_twice,
        without=((Connection, "_on_connect", without.connect_uncounted),),
        symptom="the expert: bob's step 0 is lost",
    ),
    "H11b": Hazard(
        wrong="the parts went to the old master, XADD to the new one, and the worker left: the update is lost",
        rule="one MULTI holds XADD and the STRLEN of each part; after a wrong length the worker publishes again",
        scenario=updates.h11_parts_on_the_old_master,
        without=of_worker_store(without.PublishesUnchecked),
        symptom="the expert: bob's step 0 is lost",
    ),
    "H11c": Hazard(
        wrong="a worker leaves once its last update is published, and a failover drops the update: it is lost",
        rule="a worker leaves only after its last update is decided",
        scenario=updates.h11_left_before_the_decision,
        without=((membership, "Sync", without.LeavesOncePublished),),
        symptom="the expert: bob's step 0 is lost",
    ),
    "H12": Hazard(
        wrong="the consumer group is created again at $: waiting entries are never read",
        rule="the group is always created at 0",
        scenario=commits.h12_group_was_lost,
        without=of_store(without.GroupFromTheEnd),
        symptom="alice's update 1 is never decided",
    ),
    "H13a": Hazard(
        wrong="after a rollback base_version is above the version: the staleness is negative, and decay fails",
        rule="staleness = max(0, version - base_version)",
        scenario=updates.h13_base_of_the_future,
        without=broken.BROKEN["H13_negative_staleness"].rules.patches,
        symptom="alice's update 1 is never decided",
        errors=frozenset({"staleness cannot be negative, got -1"}),
    ),
    "H13b": Hazard(
        wrong="the same in `verify`: the replay of a correct log fails",
        rule="the replay also uses staleness = max(0, version - base_version)",
        scenario=updates.h13_base_of_the_future,
        without=((verify, "staleness_of", int.__sub__),),
        symptom="the log cannot be replayed: version 1: staleness",
    ),
}
HAZARDS |= OF_REDIS | OF_COPIES | OF_PARTS
