"""Hazards of an expert's chain of commits: two aggregators, deaths, lost connections, rollbacks."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from unittest.mock import patch

from consumers.expert import Expert
from fedmoe.errors import StaleStateError
from fedmoe.protocol.keys import GROUP, Keys
from fedmoe.protocol.records import Entry
from tests.hazards.units import expect
from tests.hazards.world import EXPERT, AggregatorProcess, World

_META = Keys().expert(EXPERT).meta
COMMIT_BEGINS = f"WATCH\r\n${len(_META)}\r\n{_META}".encode()  # its first request


def h01_refused_twice(world: World) -> None:
    """A0 reads n and pauses; A1 reclaims n and refuses it, so that the version is the same; A0 refuses it too."""
    world.create(max_staleness=0)
    alice, bob = world.worker("alice"), world.worker("bob")
    a0, a1 = world.aggregator("A0"), world.aggregator("A1")
    alice.push()
    a0.turn()
    bob.push()  # one version too stale

    def rival() -> None:
        world.lease_expires()
        a1.turn()
        assert world.meta.refused == 1

    before_commit(a0.server.retained, rival)
    a0.turn()
    letters = world.redis.xlen(world.keys.dead)
    expect(letters == 1, f"bob's update is decided {letters} times")
    world.settle(a0, alice, bob)
    world.expect_expert(alice=[1], bob=[])


def h01_same_version_of_another_history(world: World) -> None:
    """A0 holds version 1 = {a}; Redis falls back to 0; A1 commits version 1 = {b}; A0 commits c on top of it."""
    world.create()
    alice, bob, carol = (world.worker(name) for name in ("alice", "bob", "carol"))
    a0, a1 = world.aggregator("A0"), world.aggregator("A1")
    replica = world.snapshot()
    alice.push()
    a0.turn()
    alice.turn()
    world.roll_back(replica)
    bob.push()
    a1.turn()
    world.lease_expires()
    carol.push()
    a0.turn(2)
    world.expect_expert(bob=[1], carol=[1])
    alice.look()
    world.settle(a0, alice, bob, carol)
    world.expect_expert(alice=[1], bob=[1], carol=[1])


def h01_rival_between_check_and_exec(world: World) -> None:
    """A0 has compared the commit id; before its EXEC, A1 commits the updates that A0 read, and one more."""
    world.create()
    alice, bob = world.worker("alice"), world.worker("bob")
    a0, a1 = world.aggregator("A0"), world.aggregator("A1")
    a0.turn()
    alice.push()

    def rival() -> None:
        world.lease_expires()
        bob.push()
        a1.turn(2)
        assert world.meta.version == 2

    a0.steps.before(b"EXEC", rival)
    a0.turn()
    world.settle(a0, alice, bob)
    world.expect_expert(alice=[1], bob=[1])


def h23_rules_changed_between_two_updates(world: World) -> None:
    """The operator halves the weight of updates in the middle of a batch of two; the new rules hold for both."""
    world.create()
    alice, bob = world.worker("alice"), world.worker("bob")
    a0 = world.aggregator()
    a0.turn()
    alice.push()
    bob.push()
    decided = 0

    def change_before_the_second() -> None:
        nonlocal decided
        decided += 1
        if decided == 2:
            world.change_rules(lr=0.5)

    expert = a0.server.retained
    assert expert
    expert.before_each = change_before_the_second
    a0.turn(3)
    expect(world.meta.rules.number == 2, "the operator's change was overwritten")
    world.settle(a0, alice, bob)
    rules = [line[b"rules"] for _, line in world.redis.xrange(world.keys.log) if b"worker" in line]
    expect(rules == [b"2", b"2"], f"the log names rules {rules}")
    world.expect_expert(alice=[0.5], bob=[0.5])
    alice.look()
    assert alice.sync.ledger.meta.rules.number == 2


def h23_update_before_the_change(world: World) -> None:
    """Alice's update is applied, the rules are changed, then bob's is applied: each under its own."""
    world.create()
    alice, bob = world.worker("alice"), world.worker("bob")
    a0 = world.aggregator()
    alice.push()
    a0.turn(2)
    world.change_rules(lr=0.5, max_norm=100.0)
    bob.push()
    world.settle(a0, alice, bob)
    world.expect_expert(alice=[1], bob=[0.5])


def h03_read_after_the_lease_was_lost(world: World) -> None:
    """A0 pauses before XREADGROUP; A1 takes the lease and reclaims; A0 wakes, reads n, commits nothing, stands by."""
    world.create()
    alice, bob = world.worker("alice"), world.worker("bob")
    a0, a1 = world.aggregator("A0"), world.aggregator("A1")
    a0.turn()

    def pause() -> None:
        world.lease_expires()
        bob.push()
        a1.turn(2)
        alice.push()

    a0.steps.before(b"XREADGROUP", pause)
    a0.turn(2)
    assert world.redis.xpending(world.keys.updates, GROUP)["pending"] == 1
    world.settle(a1, alice, bob)
    world.expect_expert(alice=[1], bob=[1])


def h03_read_and_died(world: World) -> None:
    """An aggregator reads n and is killed before its commit; the next one must find n in the pending list."""
    world.create()
    alice = world.worker("alice")
    dead, heir = world.aggregator("dead"), world.aggregator("heir")
    alice.push()
    dead.steps.kill_before(COMMIT_BEGINS)
    dead.turn()
    world.lease_expires()
    world.settle(heir, alice)
    world.expect_expert(alice=[1])


def h03_read_and_lost_the_connection(world: World) -> None:
    """The only aggregator reads n and loses its connection before the commit: n is in its own pending list."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    alice.push()
    a0.steps.before(COMMIT_BEGINS, world.cut_connections)
    world.settle(a0, alice)
    world.expect_expert(alice=[1])


def h09_removed_from_stale_memory(world: World) -> None:
    """A0 pauses, A1 decides alice's first update and dies; A0 wakes and judges the second one undecidable."""
    world.create()
    alice = world.worker("alice")
    a0, a1 = world.aggregator("A0"), world.aggregator("A1")
    a0.turn()
    world.lease_expires()
    alice.push()
    a1.turn()
    world.lease_expires()
    alice.turn()
    alice.push()
    world.settle(a0, alice)
    world.expect_expert(alice=[1, 1])


def h11_entry_id_given_twice(world: World) -> None:
    """A0 holds "entry i = a", Redis fails over to before it, bob's entry gets the id i, and bob leaves."""
    world.create()
    alice, bob = world.worker("alice"), world.worker("bob")
    a0 = world.aggregator()
    a0.turn()
    # The old master's clock was ahead, so that ids follow one another instead of the clock.
    world.redis.execute_command("XSETID", world.keys.updates, f"{2**45}-0")
    replica = world.snapshot()
    alice.push()

    def fail_over() -> None:
        world.fail_over(replica)
        bob.push()
        assert bob.sync.outbox.entry == alice.sync.outbox.entry
        bob.kill()

    before_commit(a0.server.retained, fail_over)
    a0.turn()
    world.settle(a0, alice)
    world.expect_expert(alice=[1], bob=[1])


def before_commit(expert: Expert | None, action: Callable[[], None]) -> None:
    """Call `action` after the expert has decided its next batch, before the first request of the commit."""
    assert expert
    commit = expert.commit

    def paused(batch: object) -> None:
        expert.commit = commit
        action()
        commit(batch)

    expert.commit = paused


def h12_group_was_lost(world: World) -> None:
    """The consumer group is lost (FLUSHALL, a failover, an operator) while an update waits, and is created again."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    a0.turn()
    alice.push()
    world.redis.xgroup_destroy(world.keys.updates, GROUP)
    world.settle(a0, alice)
    world.expect_expert(alice=[1])


def h15_commit_between_two_reads(world: World) -> None:
    """A0 commits during a load of A1, between any two of its requests."""
    world.create()
    alice, bob = world.worker("alice"), world.worker("bob")
    for request in range(1, 12):
        a0, a1 = world.aggregator("A0"), world.aggregator("A1")
        world.lease_expires()
        a0.turn()
        alice.push()
        batch = a0.read()
        world.lease_expires()

        def commit(a0: AggregatorProcess = a0, batch: Sequence[Entry] = batch) -> None:
            with suppress(StaleStateError):
                a0.decide(batch)

        a1.connection.ping()
        a1.steps.before(b"", commit, nth=request)
        a1.turn()
        a1.steps.forget()
        bob.push()
        world.settle(a1, alice, bob)
        world.expect_expert(alice=[1] * request, bob=[1] * request)


def h17_highest_id(world: World) -> None:
    """Somebody XADDs an entry with the highest possible id: the stream accepts no more entries, even once emptied."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    world.redis.xadd(world.keys.updates, {"worker": "mallory"}, id=f"{2**64 - 1}-{2**64 - 1}")
    alice.push()
    expect(alice.sync.status.problem, "the stream took an entry")
    world.settle(a0, alice)
    world.expect_expert(alice=[1])


def h18_log_of_the_wrong_type(world: World) -> None:
    """Somebody overwrote the log: an EXEC would change the weights and not the log. Nothing is decided meanwhile."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    a0.turn()
    world.redis.set(world.keys.log, "oops")
    world.cut_connections()
    alice.push()
    a0.turn(3)
    expect(world.meta.version == 0, "half of a commit was executed")
    world.redis.delete(world.keys.log)
    world.settle(a0, alice)
    world.expect_expert(alice=[1])


def h18_overwritten_while_serving(world: World) -> None:
    """The same while the aggregator serves: after its load, before the next commit."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    a0.turn()
    alice.push()
    a0.steps.before(COMMIT_BEGINS, lambda: world.redis.set(world.keys.decided, "oops"))
    a0.turn(3)
    expect(world.meta.version == 0, "half of a commit was executed")
    world.redis.delete(world.keys.decided)
    world.settle(a0, alice)
    world.expect_expert(alice=[1])


def h18_log_overwritten_before_exec(world: World) -> None:
    """The same, at the last moment: between the commit's WATCH and its EXEC."""
    world.create()
    alice = world.worker("alice")
    a0 = world.aggregator()
    a0.turn()
    alice.push()
    a0.steps.before(b"EXEC", lambda: world.redis.set(world.keys.log, "oops"))
    a0.turn(3)
    expect(world.meta.version == 0, "half of a commit was executed")
    world.redis.delete(world.keys.log)
    world.settle(a0, alice)
    world.expect_expert(alice=[1])


def h00_killed_before_the_commit(world: World) -> None:
    """An aggregator is killed between reading an update and its commit; the update's worker has left."""
    world.create()
    alice = world.worker("alice")
    dead, heir = world.aggregator("dead"), world.aggregator("heir")
    alice.push()
    alice.kill()
    dead.steps.kill_before(COMMIT_BEGINS)
    dead.turn()
    world.lease_expires()
    world.settle(heir)
    world.expect_expert(alice=[1])


def h25_killed_beside_the_state(world: World) -> None:
    """An aggregator with momentum is killed in the commit of its second update; another one goes on."""
    world.create()
    world.change_rules(server_optimizer="nesterov")
    alice = world.worker("alice")
    dead, heir = world.aggregator("dead"), world.aggregator("heir")
    alice.push()
    dead.turn(2)
    alice.push()
    dead.steps.kill_before(COMMIT_BEGINS)
    dead.turn()
    world.lease_expires()
    world.settle(heir, alice)
    _expect_one_beginning(world)


def h25_emptied(world: World) -> None:
    """An aggregator with momentum writes the expert back to an emptied server, and goes on."""
    world.create()
    world.change_rules(server_optimizer="nesterov")
    alice = world.worker("alice")
    a0 = world.aggregator()
    alice.push()
    a0.turn(2)
    alice.look()
    world.redis.flushall()
    a0.turn()
    a0.time_passes()
    a0.turn(2)
    alice.push()
    world.settle(a0, alice)
    _expect_one_beginning(world, before=1)


def _expect_one_beginning(world: World, *, before: int = 0) -> None:
    """The server state began once; `before`: lines that the server has lost."""
    began = [line for _, line in world.redis.xrange(world.keys.log) if b"new_state" in line]
    expect(len(began) == 1 - before, "the server optimizer began anew")
    assert world.meta.server_state == "nesterov"


def h00_clocks_run_wild(world: World) -> None:
    """The same updates with a clock that stands still and with clocks that jump: the same bytes and decisions."""

    def play(clock: Callable[[], float]) -> tuple[object, ...]:
        world.redis.flushdb()
        world.create(decay="polynomial", max_staleness=2)
        with patch("time.time", clock), patch.dict(Expert.__init__.__kwdefaults__, clock=clock):
            a0, alice = world.aggregator(), world.worker("alice")
            late = world.worker("carol")
            for number in range(3):
                bob = world.worker("bob", at=number)
                alice.push()
                bob.push(2)
                a0.turn(2)
                alice.turn()
                bob.turn()
            late.push()
            world.settle(a0, alice, late)
        log = [line[b"staleness"] + b" " + line[b"factor"] for _, line in world.redis.xrange(world.keys.log)]
        return bytes(world.flat.numpy().tobytes()), log, world.meta.refused, late.last_decision.reason

    jumps = iter([4e9, -1.0, 0.0, 1.7e9, 1e15, 3.0] * 1000)
    expect(play(lambda: 1.7e9) == play(lambda: next(jumps)), "clocks enter the outcome")
