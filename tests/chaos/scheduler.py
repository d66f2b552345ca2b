"""Kills, pauses and cuts, at random points, of real processes; and how long it takes until all is well again."""

import multiprocessing
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import redis

from fedmoe.errors import FedMoEError
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.settings import RedisSettings
from fedmoe.store.change import change_rules_soon
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from tests.chaos.actors import (
    AGGREGATORS,
    EXPERTS,
    LEASE_S,
    LEDGERS,
    RULES,
    WORKERS,
    Place,
    run_aggregator,
    run_worker,
)
from tests.chaos.failpoints import AGGREGATOR, WORKER, Arm
from tests.federation import first_meta

TICK_S = 0.02
DRAIN_S = 180.0
STUCK_S = 60.0
ARMED = 0.6  # of the processes
WATCHED = "tiny"  # the expert whose commits tell that all is well


@dataclass
class Actor:
    """One process and what is to be done with it; times are monotonic seconds, 0 for never."""

    name: str
    process: Any
    began: float
    resume_at: float = 0.0
    start_at: float = 0.0
    ended: bool = False

    @property
    def alive(self) -> bool:
        return bool(self.process.is_alive())

    @property
    def stopped(self) -> bool:
        return self.resume_at > 0


@dataclass
class Recoveries:
    """Seconds from a fault until the next commit, of faults that no other one came upon meanwhile."""

    what: str
    seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.seconds:
            return f"{self.what}: not measured"
        median, longest = statistics.median(self.seconds), max(self.seconds)
        return f"{self.what}: median {median:.2f} s, max {longest:.2f} s, n {len(self.seconds)}"


class Redis(Protocol):
    """The Redis of a run, and what is done to it."""

    url: str
    down: str  # from when it is measured how long a kill of it stops all

    def faults(self, run: "Chaos") -> dict[str, tuple[int, Callable[[], None]]]:
        """Its faults: name -> how often beside the others, and what does it."""

    def tick(self, now: float) -> None:
        """Called every few milliseconds, at a monotonic time."""

    def calm(self) -> None:
        """No more faults: undo those that last."""

    def disturbances(self) -> int:
        """Faults so far that delay a commit, without those that come with a kill."""

    def report(self) -> list[str]:
        """What was done to it, a line each."""


class Chaos:
    """A run: three aggregators, six workers, a Redis (one server, or a cluster), and a dice.

    Args:
        place: its files; the URL is the proxy's, if there is one.
        server: the Redis.
        report: where a line for people goes.
        without: a rule to do without (tests/chaos/without.py), "" for none.
    """

    def __init__(
        self,
        place: Place,
        server: Redis,
        dice: random.Random,
        *,
        kills: int,
        report: Callable[[str], None],
        without: str = "",
    ) -> None:
        self.place = place
        self.kills = 0
        self.killed: Counter[str] = Counter()  # by kind of process
        self.faults: Counter[str] = Counter()  # what the scheduler did
        self.failpoints: Counter[str] = Counter()  # what processes did to themselves, and where
        self.changes = 0  # of rules
        self.failures: list[str] = []
        self.takeovers = Recoveries("aggregator killed until the next commit")
        self.restarts = Recoveries(f"{server.down} until the next commit")
        self._wanted = kills
        self._redis = server
        self.dice = dice
        self._report = report
        self._without = without
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.chaos.actors"])
        self.connection = Connection(RedisSettings(url=server.url, timeout_s=5.0))
        self._actors: dict[str, Actor] = {}
        self._journal = 0  # bytes of the failpoints' journal that were read
        self._disturbed = 0  # faults so far that delay a commit
        self._armed = True

    # ---- processes

    def create(self) -> None:
        """The experts at version 0."""
        for name, spec in EXPERTS.items():
            buffer = AdapterBuffer(spec.layout)
            buffer.flat.copy_(initial_weights(spec.layout, spec.init_seed))
            meta = first_meta(spec, base_model=spec.base_model, rules=RULES[name])
            ExpertStore(self.connection, name).create(spec, meta, buffer.file, gateway_weight=1.0)

    def _start(self, name: str) -> None:
        is_worker = name in WORKERS
        armed = self._armed and self.dice.random() < ARMED
        arm = Arm.draw(WORKER if is_worker else AGGREGATOR, self.dice) if armed else None
        target = run_worker if is_worker else run_aggregator
        process = self._context.Process(
            target=target, args=(self.place, name, arm, self._without), daemon=True
        )
        process.start()
        self._actors[name] = Actor(name, process, time.monotonic())

    def _kill(self, actor: Actor) -> None:
        with suppress(ProcessLookupError):
            os.kill(actor.process.pid, signal.SIGKILL)
        actor.process.join(10)

    def _tick(self) -> None:
        """What is due: starts, resumptions, deaths, and the file's size."""
        now = time.monotonic()
        self._read_journal()
        for actor in list(self._actors.values()):
            if actor.resume_at and now >= actor.resume_at:
                actor.resume_at = 0.0
                with suppress(ProcessLookupError):
                    os.kill(actor.process.pid, signal.SIGCONT)
            if actor.start_at and now >= actor.start_at:
                self._start(actor.name)
            elif not actor.alive and not actor.start_at and not actor.ended:
                self._reap(actor, now)
        self._redis.tick(now)

    def _reap(self, actor: Actor, now: float) -> None:
        code = actor.process.exitcode
        if code == -signal.SIGKILL:
            self.kills += 1
            self.killed["worker" if actor.name in WORKERS else "aggregator"] += 1
            self._disturbed += actor.name in AGGREGATORS
            actor.start_at = now + self.dice.choice((0.01, 0.01, 0.5, 1.5))
        elif not self._armed and code in (0, -signal.SIGTERM):
            if code == 0:
                actor.ended = True
            else:
                actor.start_at = now  # told to end before it had begun
        else:
            self.failures.append(
                f"{actor.name} ended by itself with exit code {code}: see {self.place.log(actor.name)}"
            )
            actor.ended = True

    def _read_journal(self) -> None:
        if not self.place.failpoints.exists():
            return
        with self.place.failpoints.open() as lines:
            lines.seek(self._journal)
            for line in lines:
                name, pid, action, method, moment = line.split()
                self.failpoints[action] += 1
                self.failpoints[f"{method} {moment}"] += 1
                self._disturbed += name in AGGREGATORS
                actor = self._actors[name]
                if action == "stop" and actor.process.pid == int(pid):
                    actor.resume_at = time.monotonic() + self.dice.uniform(0.5, 3 * LEASE_S)
            self._journal = lines.tell()

    # ---- faults

    def _pick(self, names: Any) -> Actor | None:
        there = [a for a in map(self._actors.__getitem__, names) if a.alive and not a.stopped]
        return self.dice.choice(there) if there else None

    def _serving(self) -> Actor | None:
        """The aggregator that serves the watched expert."""
        lease = self.connection.keys.expert(WATCHED).lease
        holder = self.connection.at(lease).client.get(lease)
        pid = int(holder.decode().rsplit("-", 2)[1]) if holder else 0
        return next((a for a in self._actors.values() if a.process.pid == pid and a.alive), None)

    def _kill_aggregator(self) -> None:
        victim = self._serving() if self.dice.random() < 0.7 else self._pick(AGGREGATORS)
        if victim is None:
            return
        others = [self._actors[name] for name in AGGREGATORS if name != victim.name]
        fair = victim == self._serving() and all(
            other.alive and not other.stopped and time.monotonic() - other.began > 1.0 for other in others
        )
        self._kill(victim)
        killed = time.monotonic()
        self._reap(victim, killed)
        if fair:
            self.watch(self.takeovers, killed)

    def _kill_worker(self) -> None:
        if victim := self._pick(WORKERS):
            self._kill(victim)

    def _pause(self, names: Any) -> None:
        if victim := self._pick(names):
            os.kill(victim.process.pid, signal.SIGSTOP)
            victim.resume_at = time.monotonic() + self.dice.uniform(0.3, 3 * LEASE_S)

    def _fault(self) -> None:
        faults: dict[str, tuple[int, Callable[[], None]]] = {
            "kill -9 aggregator": (25, self._kill_aggregator),
            "kill -9 worker": (30, self._kill_worker),
            "pause aggregator": (6, lambda: self._pause(AGGREGATORS)),
            "pause worker": (4, lambda: self._pause(WORKERS)),
            "change the rules": (16, self._change_rules),
            **self._redis.faults(self),
        }
        name = self.dice.choices(list(faults), [weight for weight, _ in faults.values()])[0]
        self.faults[name] += 1
        with suppress(redis.RedisError):
            faults[name][1]()

    def _change_rules(self) -> None:
        """What `fedmoe expert set` does."""
        store = ExpertStore(self.connection, self.dice.choice(list(EXPERTS)))
        with suppress(FedMoEError):  # Redis is away
            before, after = change_rules_soon(store, {"lr": round(self.dice.uniform(0.2, 1.0), 3)})
            self.changes += after != before

    def _of(self, expert: str, field: str) -> Any:
        meta = self.connection.keys.expert(expert).meta
        return self.connection.at(meta).client.hget(meta, field)

    def _commit(self) -> bytes | None:
        with suppress(redis.RedisError):
            return self._of(WATCHED, "commit")
        return None

    def watch(self, recoveries: Recoveries, since: float) -> None:
        """More often than not, wait for the next commit before the next fault, and note how long it took."""
        if self.dice.random() < 0.3:
            return
        before, disturbances = self._commit(), self._disturbances()
        while time.monotonic() < since + 10.0 and self._commit() in (None, before):
            self._tick()
            time.sleep(TICK_S / 2)
        if self._disturbances() == disturbances:
            recoveries.seconds.append(time.monotonic() - since)

    def _disturbances(self) -> int:
        """Faults so far that delay a commit."""
        return self._disturbed + self._redis.disturbances()

    def report(self) -> str:
        """What was done, and how long it took to recover."""
        killed, points = self.killed, self.failpoints
        places = sorted(name for name in points if " " in name)
        return "\n".join(
            [
                f"killed: {killed['aggregator']} aggregators, {killed['worker']} workers, {killed['redis']} x Redis",
                *self._redis.report(),
                f"of these at failpoints: {points['kill']}; stopped there {points['stop']}, cut there {points['cut']}",
                f"at {len(places)} points: {', '.join(places)}",
                f"rules changed: {self.changes} times",
                "faults: " + ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items())),
                str(self.takeovers),
                str(self.restarts),
            ]
        )

    def run(self) -> None:
        """Faults until there were enough kills, then let all of them end in peace."""
        self.create()
        for name in (*AGGREGATORS, *WORKERS):
            self._start(name)
        self._wait_until("every worker has published", self._all_published, STUCK_S)
        said = 0
        while self.kills < self._wanted and not self.failures:
            self._tick()
            self._fault()
            until = time.monotonic() + self.dice.choice((0.05, 0.3, 0.6, 1.0))
            while time.monotonic() < until:
                self._tick()
                time.sleep(TICK_S)
            if self.kills >= said + 50:
                said = self.kills
                self._report(f"{self.kills} kills, {self._versions()}")
        self._end()

    def _versions(self) -> str:
        with suppress(redis.RedisError):
            return ", ".join(f"{name} at version {int(self._of(name, 'version'))}" for name in EXPERTS)
        return "Redis is away"

    def _all_published(self) -> bool:
        text = self.place.published.read_text() if self.place.published.exists() else ""
        return {line.split()[0] for line in text.splitlines()} == set(LEDGERS)

    def _wait_until(self, what: str, true: Callable[[], bool], timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while not true() and not self.failures:
            if time.monotonic() > until:
                self.failures.append(f"waited {timeout_s:.0f} s until {what}")
            self._tick()
            time.sleep(TICK_S)

    def _end(self) -> None:
        """No more faults: workers publish the rest and leave, then the aggregators."""
        self._armed = False
        self._redis.calm()
        told: set[int] = set()

        def ended(names: Any) -> bool:
            now = time.monotonic()
            for actor in map(self._actors.__getitem__, names):
                pid = actor.process.pid
                busy = actor.name in AGGREGATORS or self.place.trains(actor.name, pid)
                if actor.alive and not actor.stopped and pid not in told and busy and now - actor.began > 2.0:
                    told.add(pid)
                    os.kill(pid, signal.SIGTERM)
            return all(self._actors[name].ended for name in names)

        self._wait_until("every worker has left", lambda: ended(WORKERS), DRAIN_S)
        self._wait_until("the aggregators have ended", lambda: ended(AGGREGATORS), DRAIN_S)

    def close(self) -> None:
        """Kill what still runs, also what is stopped."""
        for actor in self._actors.values():
            self._kill(actor)
