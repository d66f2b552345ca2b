"""Several aggregators that see each other's heartbeats at different times: they agree, and few experts move."""

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from consumers.assignment import PATIENCE_LEASES, RAISE_LEASES, Assignment
from fedmoe.protocol.assignment import AggregatorBeat, assign
from tests.unit.test_assignment import EXPERTS, NAMES, counted

LEASE_S = 5.0
BEAT_S, BEAT_TTL_S = 1.0, 3.0


@dataclass
class Redis:
    """The heartbeats and the leases: name → (text, end), expert → (holder, end)."""

    beats: dict[str, tuple[str, float]] = field(default_factory=dict)
    leases: dict[str, tuple[str, float]] = field(default_factory=dict)
    moves: int = 0

    def hold(self, expert: str, name: str, now: float) -> bool:
        holder, end = self.leases.get(expert, ("", 0.0))
        if end > now and holder != name:
            return False
        self.moves += holder != name
        self.leases[expert] = name, now + LEASE_S
        return True

    def holders(self, now: float) -> dict[str, str]:
        return {expert: holder for expert, (holder, end) in self.leases.items() if end > now}


class Simulated:
    """One aggregator: its assignment, and a thread for each expert, all by one clock."""

    def __init__(self, name: str, redis: Redis, experts: list[str], now: float) -> None:
        self.name, self.redis, self.experts = name, redis, experts
        self.assignment = Assignment(name, lease_s=LEASE_S)
        self.held: set[str] = set()
        self.unable: set[str] = set()  # what it tries to serve and cannot
        self.deaf: set[str] = set()  # what it never tries to serve, and says nothing
        self.is_cut_off = False  # its next heartbeat needs a new connection
        self.beat(now)
        for expert in experts:
            self.assignment.add(expert, ttl_s=LEASE_S, now=now)

    def beat(self, now: float) -> None:
        self.redis.beats[self.name] = self.assignment.present(now).to_json(), now + BEAT_TTL_S
        living = {n: AggregatorBeat.read(text) for n, (text, end) in self.redis.beats.items() if end > now}
        self.assignment.see(living, now, reconnected=self.is_cut_off)
        self.is_cut_off = False

    def turn(self, expert: str, now: float) -> None:
        """What a server does between two batches."""
        if expert in self.deaf:
            self.assignment.wants(expert, now)
        elif self.assignment.wants(expert, now):
            held = self.redis.hold(expert, self.name, now)
            self.assignment.has(expert, held, now)
            (self.held.add if held else self.held.discard)(expert)
            if held and expert in self.unable:
                self.release(expert, now)
                self.assignment.cannot(expert, now)
        elif expert in self.held:
            self.release(expert, now)
            self.assignment.has(expert, False, now)

    def release(self, expert: str, now: float) -> None:
        self.held.discard(expert)
        if self.redis.leases.get(expert, ("",))[0] == self.name:
            del self.redis.leases[expert]


class World:
    """Aggregators that act in random order, and beat at times of their own."""

    def __init__(self, dice: random.Random, n_experts: int) -> None:
        self.dice = dice
        self.redis = Redis()
        self.experts = EXPERTS[:n_experts]
        self.there: dict[str, Simulated] = {}
        self.next_beat: dict[str, float] = {}
        self.paused: dict[str, float] = {}
        self.now = 100.0
        self.unserved_s: dict[str, float] = dict.fromkeys(self.experts, 0.0)

    def start(self, name: str) -> None:
        self.there[name] = Simulated(name, self.redis, self.experts, self.now)
        self.next_beat[name] = self.now + self.dice.uniform(0, BEAT_S)

    def kill(self, name: str) -> None:
        del self.there[name]

    def run(self, seconds: float) -> None:
        """Time passes in steps of 0.2 s, as often as a thread without the lease looks."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.2
            for one in self.dice.sample(list(self.there.values()), len(self.there)):
                if self.paused.get(one.name, 0.0) > self.now:
                    continue
                if self.now >= self.next_beat[one.name]:
                    one.beat(self.now)
                    self.next_beat[one.name] = self.now + BEAT_S
                for expert in self.experts:
                    one.turn(expert, self.now)
            holders = self.redis.holders(self.now)
            for expert in self.experts:
                self.unserved_s[expert] = 0.0 if expert in holders else self.unserved_s[expert] + 0.2

    def served(self) -> dict[str, str]:
        return {expert: name for expert, name in self.redis.holders(self.now).items() if name in self.there}

    def counts(self) -> list[int]:
        return counted(self.served(), self.there)


@settings(max_examples=8, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(2, 6), st.integers(0, 20))
def test_they_agree_whatever_happened_before(dice: random.Random, n: int, n_experts: int) -> None:
    """Starts, deaths and pauses at random; two leases later all is served evenly, and nothing moves any more."""
    world = World(dice, n_experts)
    for name in NAMES[:n]:
        world.start(name)
        world.run(dice.choice([0.2, 3.0]))
    for _ in range(6):
        name = dice.choice(NAMES[:n])
        if name not in world.there:
            world.start(name)
        elif dice.random() < 0.5:
            world.paused[name] = world.now + dice.uniform(0.0, 3 * LEASE_S)
        elif len(world.there) > 1:
            world.kill(name)
        world.run(dice.uniform(0.2, 6.0))
    world.paused.clear()
    world.run(2 * LEASE_S)
    assert world.served().keys() == set(world.experts)
    count = world.counts()
    # A pause can leave an expert with one that took it for another; it is kept for a while.
    if count[-1] - count[0] > 1:
        world.run((PATIENCE_LEASES + 2) * LEASE_S)
        count = world.counts()
    assert count[-1] - count[0] <= 1
    before = world.served()
    world.run(3 * LEASE_S)
    assert world.served() == before


@settings(max_examples=8, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(2, 5), st.integers(1, 20))
def test_a_death_moves_only_its_experts_within_a_lease(dice: random.Random, n: int, n_experts: int) -> None:
    world = World(dice, n_experts)
    for name in NAMES[:n]:
        world.start(name)
    world.run(20.0)
    before, moves = world.served(), world.redis.moves
    victim = dice.choice(list(world.there))
    world.kill(victim)
    world.run(LEASE_S + 0.6)
    after = world.served()
    assert world.redis.moves - moves == list(before.values()).count(victim)
    assert after.keys() == set(world.experts)
    assert {e: name for e, name in after.items() if before[e] != victim} == {
        e: name for e, name in before.items() if name != victim
    }


@settings(max_examples=8, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 5), st.integers(1, 20))
def test_a_newcomer_moves_only_what_it_gets(dice: random.Random, n: int, n_experts: int) -> None:
    world = World(dice, n_experts)
    for name in NAMES[:n]:
        world.start(name)
    world.run(20.0)
    before, moves = world.served(), world.redis.moves
    world.start("new")
    world.run(LEASE_S)
    after = world.served()
    its = [expert for expert, name in after.items() if name == "new"]
    assert len(its) == n_experts // (n + 1)
    assert {e: name for e, name in after.items() if e not in its} == {
        e: name for e, name in before.items() if e not in its
    }
    assert world.redis.moves - moves == len(its)


def test_after_an_outage_everybody_goes_on_with_what_it_had() -> None:
    """The leases have ended, and the heartbeats are gone; the first one that is heard of does not take all."""
    world = World(random.Random(1), 8)
    for name in NAMES[:3]:
        world.start(name)
    world.run(20.0)
    before = world.served()
    world.now += 4 * LEASE_S
    world.redis.leases.clear()
    world.redis.beats.clear()
    for one in world.there.values():
        one.is_cut_off = True
    world.run(LEASE_S)
    assert world.served() == before


def test_what_was_retained_and_is_served_by_another_stays_there() -> None:
    """One was stopped for longer than its leases: when it wakes, it gets its share of what the other serves."""
    beats = {
        "awake": AggregatorBeat(serves=frozenset("abcde")),
        "slept": AggregatorBeat(serves=frozenset(), retains=frozenset("ab")),
    }
    assert assign(beats, "abcde") == {"a": "awake", "b": "awake", "c": "awake", "d": "slept", "e": "slept"}


def test_what_one_cannot_serve_another_does() -> None:
    """It says so, and the others serve it from then on; the number that it serves otherwise stays even."""
    world = World(random.Random(1), 6)
    for name in NAMES[:3]:
        world.start(name)
    world.there["agg-0"].unable = set(world.experts[:3])
    world.run(10 * LEASE_S)
    assert all(world.served()[expert] != "agg-0" for expert in world.experts[:3])
    assert world.counts() == [2, 2, 2]


def test_what_one_should_serve_and_does_not_anybody_takes_after_a_lease() -> None:
    """It says nothing of it, so nobody knows why."""
    world = World(random.Random(1), 6)
    for name in NAMES[:3]:
        world.start(name)
    world.there["agg-0"].deaf = set(world.experts)
    longest = 0.0
    for _ in range(400):
        world.run(0.2)
        longest = max(longest, *world.unserved_s.values())
    assert longest < 2.5 * LEASE_S
    assert set(world.served().values()) == {"agg-1", "agg-2"}


def test_what_one_without_heartbeats_held_goes_to_those_who_should_have_it() -> None:
    """An aggregator of an earlier release sends none: when it ends, nobody takes more than its share."""
    one, other, now = Assignment("one", lease_s=LEASE_S), AggregatorBeat(), 1000.0
    for expert in "ab":
        one.add(expert, ttl_s=LEASE_S, now=now)
    for _ in range(100):
        one.see({"one": one.present(now), "other": other}, now)
        for expert in "ab":
            if one.wants(expert, now):
                one.has(expert, False, now)  # the earlier release has it
        now += LEASE_S / 20
    taken = [expert for expert in "ab" for _ in range(4) if one.wants(expert, now)]
    assert set(taken) == {"a"}


def test_a_slow_one_gives_up_what_it_cannot_keep_up_with_and_tries_again_later() -> None:
    one, now = Assignment("one", lease_s=LEASE_S), 1000.0
    for expert in "abc":
        one.add(expert, ttl_s=LEASE_S, now=now)
    living = {"one": AggregatorBeat(), "two": AggregatorBeat()}
    one.see(living, now)

    def later(seconds: float, waited_s: float) -> AggregatorBeat:
        nonlocal now
        now += seconds
        for expert in "abc":
            one.wants(expert, now)
            one.has(expert, True, now)
        one.waited("b", waited_s, sync_interval_s=10.0, now=now)
        one.see(living, now)
        return one.present(now)

    assert later(1.0, 29.0).limit is None
    beat = later(1.0, 31.0)
    assert (beat.limit, beat.overdue) == (2, frozenset("b"))
    assert later(1.0, 31.0).limit == 2  # the effect is waited for
    assert later(PATIENCE_LEASES * LEASE_S + 1, 31.0).limit == 2  # it still serves three: one fewer is two
    assert later(1.0, 0.0).limit == 2
    assert later(4 * RAISE_LEASES * LEASE_S + 1, 0.0).limit is None


def test_one_that_is_alone_gives_nothing_up() -> None:
    one = Assignment("one", lease_s=LEASE_S)
    one.add("a", ttl_s=LEASE_S, now=1.0)
    one.see({"one": AggregatorBeat()}, 1.0)
    one.has("a", True, 1.0)
    one.waited("a", 1e6, sync_interval_s=1.0, now=1.0)
    assert one.present(1.1).limit is None


def test_without_heartbeats_it_takes_what_is_free_and_keeps_it() -> None:
    one = Assignment("one", lease_s=LEASE_S)
    one.add("a", ttl_s=LEASE_S, now=1.0)
    assert one.wants("a", 1.0)
    one.see({"one": AggregatorBeat(), "two": AggregatorBeat(serves=frozenset("a"))}, 1.0)
    assert not one.wants("a", 1.0)
    one.is_blind()
    assert one.wants("a", 1.0)


def test_after_a_reconnect_it_takes_nothing_for_a_moment_and_keeps_what_it_has() -> None:
    """Redis may have an older state, and an aggregator that retains a newer one needs time to claim it."""
    one = Assignment("one", lease_s=LEASE_S)
    for expert in "ab":
        one.add(expert, ttl_s=LEASE_S, now=1.0)
    living = {"one": AggregatorBeat(serves=frozenset("a"))}
    one.see(living, 1.0)
    one.has("a", True, 1.0)
    one.see(living, 1.5, reconnected=True)
    assert (one.wants("a", 1.6), one.wants("b", 1.6)) == (True, False)
    assert one.wants("b", 3.6)
