"""The Redis Cluster of a run: masters are killed and frozen, fail over, and slots move, all under load."""

import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import redis

from fedmoe.protocol.keys import Keys
from tests.chaos.actors import EXPERTS
from tests.chaos.scheduler import WATCHED, Chaos
from tests.cluster import Cluster
from tests.processes import eventually
from tests.sentinel import Process

WHOLE_S = 30.0


class Clustered:
    """Three masters and their replicas; one node at a time is away, as each master has one replica only."""

    down = "a master was killed"

    def __init__(self, cluster: Cluster) -> None:
        self.url = cluster.url
        self._cluster = cluster
        self._done: Counter[str] = Counter()
        self._away: dict[float, Process] = {}  # when it is started again, monotonic seconds -> node
        self._frozen: dict[float, Process] = {}

    def faults(self, run: Chaos) -> dict[str, tuple[int, Callable[[], None]]]:
        """Its faults."""
        return {
            "kill -9 a master": (6, lambda: self._kill(run)),
            "kill -9 a master, ahead of its replica": (
                6,
                lambda: self._kill(run, ahead_s=run.dice.uniform(0.2, 1.0)),
            ),
            "CLUSTER FAILOVER": (8, lambda: self._fail_over(run)),
            "move a slot": (8, lambda: self._move(run)),
            "freeze a master": (4, lambda: self._freeze(run)),
            "cut all connections": (8, self._cut),
        }

    def _key(self, run: Chaos) -> str:
        return Keys().expert(run.dice.choice(list(EXPERTS))).meta

    def _is_whole(self) -> bool:
        with suppress(redis.RedisError):
            return not self._away and not self._frozen and self._cluster.is_whole()
        return False

    def _kill(self, run: Chaos, *, ahead_s: float = 0.0) -> None:
        """Kill a master; with `ahead_s`, what it was sent in that many seconds before has not reached its replica."""
        if not self._is_whole():
            return
        node = self._cluster.master_of(self._key(run))
        is_watched = node is self._cluster.master_of(Keys().expert(WATCHED).meta)
        replica = self._cluster.replica_of(node)
        if ahead_s:
            replica.signal(signal.SIGSTOP)
            node.client.execute_command("CLIENT KILL TYPE replica")
            time.sleep(ahead_s)
        node.kill()
        replica.signal(signal.SIGCONT)
        killed = time.monotonic()
        self._away[killed + run.dice.choice((0.1, 3.0, 5.0))] = node
        run.kills += 1
        run.killed["redis"] += 1
        self._done["killed masters"] += 1
        if is_watched:
            run.watch(run.restarts, killed)

    def _fail_over(self, run: Chaos) -> None:
        if self._is_whole():
            self._cluster.fail_over(self._key(run))
            self._done["failovers"] += 1

    def _move(self, run: Chaos) -> None:
        if self._is_whole():
            moved = self._cluster.move_slot(self._key(run), pause_s=run.dice.choice((0.0, 0.02, 0.1)))
            self._done["moved slots"] += 1
            self._done["moved keys"] += moved

    def _freeze(self, run: Chaos) -> None:
        if self._is_whole():
            node = self._cluster.master_of(self._key(run))
            node.signal(signal.SIGSTOP)
            self._frozen[time.monotonic() + run.dice.uniform(0.2, 4.0)] = node
            self._done["frozen masters"] += 1

    def _cut(self) -> None:
        for node in self._cluster.nodes:
            with suppress(redis.RedisError):
                if node.is_running() and node not in self._frozen.values():
                    node.client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
        self._done["cuts of all connections"] += 1

    def tick(self, now: float) -> None:
        """Start what is due to come back, and wake what is frozen."""
        for at in [at for at in self._away if now >= at]:
            self._away.pop(at).start()
        for at in [at for at in self._frozen if now >= at]:
            self._frozen.pop(at).signal(signal.SIGCONT)

    def calm(self) -> None:
        """Bring back all nodes."""
        self.tick(float("inf"))
        eventually("the cluster", self._is_whole, timeout_s=WHOLE_S)

    def disturbances(self) -> int:
        """All faults but kills."""
        return sum(n for what, n in self._done.items() if what not in ("killed masters", "moved keys"))

    def report(self) -> list[str]:
        """What was done to it."""
        return ["cluster: " + ", ".join(f"{what} {count}" for what, count in sorted(self._done.items()))]
