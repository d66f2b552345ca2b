"""What a thousand workers cost, of 16 experts with two aggregators: memory, connections, commands when idle, CPU.

Adapters of 64 KiB. A worker has its connection, and sends its heartbeats as `producers.sync` does, also while it
publishes nothing. Constants are measured without workers and with the fewest; what follows for more is compared with
what is measured there.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import fmean

from fedmoe.protocol.identity import BaseIdentity
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from ops.bench.adapters import LAYOUTS
from ops.bench.contest import Contestant, Sample, Seats, take_turns
from ops.bench.fedmoe_side import (
    DEFAULT_FORMAT,
    FINGERPRINT,
    RULES,
    Client,
    aggregator_command,
    create_expert,
    make_spec,
)
from ops.bench.plan import Plan
from ops.bench.processes import BenchError
from ops.bench.result import Result, figure, ratio
from producers.heartbeat import Heartbeat, SyncStatus
from producers.watch import AggregatorWatch

LAYOUT = LAYOUTS["64kib"]
EXPERTS, AGGREGATORS, PROCESSES = 16, 2, 2
SERVER = ("aggregator", "redis")
QUIET_SOON = replace(RULES, sync_interval_s=0.5)  # so an idle expert has no tail after ten of them
COUNTS = ("commands_per_s", "redis_mib", "connections", "server_cpu")


class Worker(Client):
    """A client with heartbeats, at a phase of its own."""

    def __init__(self, url: str, expert: str, name: str, phase: float) -> None:
        super().__init__(url, expert, name)
        self._heartbeat = Heartbeat(
            self.store,
            BaseIdentity(fingerprint=FINGERPRINT),
            state_id="",
            training_fields=dict,
            clock=time.monotonic,
        )
        self._heartbeat.next_at = time.monotonic() + phase
        self._watch = AggregatorWatch(self.store, self._heartbeat.hasten)

    @property
    def due_at(self) -> float:
        """When the next heartbeat is due."""
        return self._heartbeat.next_at

    def live(self) -> None:
        """Send the heartbeat if it is due."""
        self._heartbeat.beat(self.ledger, SyncStatus(in_flight=int(self.busy)))
        self._watch.look()


def play(seats: Seats, index: int, url: str, names: Sequence[tuple[str, str]]) -> None:
    """Body of a process: (expert, name) of each worker that it plays, in turn; idle ones go on living."""
    workers = [
        Worker(url, expert, name, phase=5.0 * number / len(names))
        for number, (expert, name) in enumerate(names)
    ]
    seats.report(index, busy=False)
    while True:
        going = seats.go.is_set()
        seats.report(index, busy=going or any(worker.busy for worker in workers))
        now, wake_at = time.monotonic(), time.monotonic() + 0.05
        for worker in workers:
            if worker.due_at <= now:
                worker.live()
            if going or worker.busy:
                if worker.turn():
                    seats.count(index, worker.took_s)
                wake_at = min(wake_at, worker.next_at)
        time.sleep(max(0.0, wake_at - time.monotonic()))


@dataclass(frozen=True, slots=True)
class Idle:
    """A federation in which nothing is published: its server by second, and what it holds."""

    commands_per_s: float
    redis_mib: float
    connections: float
    server_cpu: float  # CPU-seconds a second of aggregators and Redis


class Scale(Contestant):
    """Two aggregators of 16 experts, and so many workers; 0 for none."""

    def __init__(self, workers: int) -> None:
        super().__init__(f"scale_{workers}_workers", n_clients=min(PROCESSES, workers) or 1)
        self.n_workers = workers
        self._experts = [f"expert{number}" for number in range(EXPERTS)]
        self._url = ""

    def _start(self) -> None:
        self._url = self.processes.redis()
        spec = make_spec(LAYOUT, DEFAULT_FORMAT)
        for name in self._experts:
            create_expert(self._url, name, spec, rules=QUIET_SOON)
        for _ in range(AGGREGATORS):
            # The merged gateway of 16 experts would be rebuilt all the time, and is no part of an update.
            self.processes.command(
                "aggregator", *aggregator_command(self._url, self._experts[:1], "--gateway-interval", "3600")
            )
        names = [(self._experts[n % EXPERTS], f"worker{n}") for n in range(self.n_workers)]
        if not names:
            self.processes.call("clients", leave, self.seats, self._url, self._experts)
        for index in range(self.n_clients if names else 0):
            self.processes.call("clients", play, self.seats, index, self._url, names[index :: self.n_clients])

    def idle(self, seconds: float) -> Idle:
        """What the server does while nobody publishes."""
        connection = Connection(RedisSettings(url=self._url))
        self.processes.until("both aggregators to serve", lambda: self._shares(connection))
        self.processes.sleep(
            min(6.0, 2 * seconds)
        )  # longer than a heartbeat's interval, so that all have been sent

        def now() -> tuple[float, Mapping[str, float], float]:
            return (
                connection.client.info("stats")["total_commands_processed"],
                self.processes.cpu_s(),
                time.monotonic(),
            )

        commands, cpu, began = now()
        used = []  # the buffers of connections come and go
        while time.monotonic() < began + seconds:
            self.processes.sleep(0.5)
            used.append(connection.client.info("memory")["used_memory"])
        more, after, ended = now()
        n_connections = connection.client.info("clients")["connected_clients"]
        connection.close()
        return Idle(
            commands_per_s=(more - commands) / (ended - began),
            redis_mib=fmean(used) / 2**20,
            connections=n_connections - 1.0,
            server_cpu=sum(after[role] - cpu[role] for role in SERVER) / (ended - began),
        )

    def turn(self, seconds: float) -> Sample:
        """As a Contestant's, but begun when the first worker has come round, and of what the aggregators applied."""
        connection = Connection(RedisSettings(url=self._url))
        done = sum(self.seats.done)
        self.seats.go.set()
        self.processes.until("the first update of a turn", lambda: sum(self.seats.done) > done)

        def now() -> tuple[float, int, Mapping[str, float]]:
            metas = GatewayStore(connection).metas().values()
            return time.monotonic(), sum(meta.applied for meta in metas), self.processes.cpu_s()

        (began, before, cpu), _, (ended, after, used) = now(), self.processes.sleep(seconds), now()
        connection.close()
        self.pause()
        if after == before:
            raise BenchError(f"{self.name}: no update was applied in {seconds:g} s")
        return Sample(after - before, ended - began, {role: s - cpu[role] for role, s in used.items()})

    def _shares(self, connection: Connection) -> bool:
        keys = [connection.keys.expert(name).lease for name in self._experts]
        return len(set(connection.client.mget(keys)) - {None}) == AGGREGATORS


def leave(seats: Seats, url: str, experts: Sequence[str]) -> None:
    """Body of a process: each expert gets its first update, and nobody stays."""
    for expert in experts:
        client = Client(url, expert, "gone")
        while not client.turn():
            time.sleep(0.01)
        client.store.connection.close()
    seats.count(0)
    while True:
        time.sleep(1.0)


def run(plan: Plan) -> Iterator[Result]:
    """Idle federations by the number of workers, and the cost of an update of the most beside that of the fewest."""
    fewest, *more = plan.scale
    idle: dict[int, Idle] = {}
    for n in (0, *plan.scale):
        with Scale(n) as federation:
            idle[n] = federation.idle(plan.idle_s)
        for what in COUNTS:
            yield figure(f"scale_{n}_workers_idle_{what}", [getattr(idle[n], what)], _UNITS[what])
    for what in COUNTS:
        base = getattr(idle[0], what)
        each = (getattr(idle[fewest], what) - base) / fewest
        yield figure(f"scale_idle_{what}_a_worker", [each], _UNITS[what])
        for n in more:
            predicted = base + n * each
            yield figure(
                f"scale_{n}_workers_idle_{what}_vs_predicted", [getattr(idle[n], what) / predicted], "x"
            )
    if more:
        yield from _updates(plan, idle, fewest, more[-1])


_UNITS = {"commands_per_s": "commands/s", "redis_mib": "MiB", "connections": "", "server_cpu": "s/s"}


def _updates(plan: Plan, idle: Mapping[int, Idle], fewest: int, most: int) -> Iterator[Result]:
    """Server CPU of an update, when all workers publish as fast as they can, in turns.

    The last ratio is without the CPU that the same federation uses when it is idle.
    """
    few, many = Scale(fewest), Scale(most)
    with ExitStack() as stack:
        stack.enter_context(few)
        stack.enter_context(many)
        samples = take_turns([few, many], rounds=plan.rounds, seconds=plan.seconds)
    costs = {name: [turn.cpu_ms(*SERVER) for turn in turns] for name, turns in samples.items()}
    for name, turns in samples.items():
        yield figure(f"{name}_updates_per_s", [turn.per_s for turn in turns], "updates/s")
        yield figure(f"{name}_server_cpu_ms", costs[name], "ms/update")
    yield ratio("scale_update_cpu_most_vs_fewest", costs[many.name], costs[few.name])
    alone = {
        one.name: [
            turn.cpu_ms(*SERVER) - idle[one.n_workers].server_cpu * 1000 / turn.per_s
            for turn in samples[one.name]
        ]
        for one in (few, many)
    }
    yield ratio("scale_update_cpu_beyond_idle_most_vs_fewest", alone[many.name], alone[few.name])
