"""Virtual workers on a virtual clock: the order of events depends on the seed alone, never on this machine.

A worker's step takes 1 / speed virtual seconds. At a step boundary it settles what it pulled, publishes what is due,
and takes the next step. An update reaches the server a delay later, and the decision its worker another delay later;
training goes on meanwhile, so staleness arises as in a real federation. The ledger, the codec and the fold are real.
"""

import heapq
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from fedmoe.protocol.update import make_run
from ops.bench.fedmoe_side import FINGERPRINT
from ops.bench.learning.runs import GATEWAY, ONE_PASS, Run, WorkerPlan
from ops.bench.learning.server import Server
from producers.exchange import Step
from producers.ledger import Change, Ledger, Trained

MOMENT_S = 1e-9  # times that differ by less are the same


class Learner(Protocol):
    """What a chain needs of a trainer.

    Attributes:
        flat: (numel,) fp32, which a step changes.
        frozen: adapters (numel,) that are active beside it; they are replaced when they are pulled.
    """

    flat: torch.Tensor
    frozen: Sequence[torch.Tensor]

    def step(self) -> Step:
        """One optimizer step."""
        ...


Watch = Callable[[float], None]  # called with the virtual second
Make = Callable[[WorkerPlan, str, torch.Tensor], Learner]  # of a worker and a chain, on its own flat vector


class Clock:
    """A queue of events; those of one moment happen in the order in which they were planned."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._planned = 0

    def at(self, when: float, event: Callable[[], None]) -> None:
        """Plan an event at a virtual second."""
        heapq.heappush(self._events, (when, self._planned, event))
        self._planned += 1

    def run(self) -> None:
        """Let all events happen, also those that events plan."""
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()


class Chain:
    """One worker's side of one chain: its trainer, its ledger, and its update on the way.

    Args:
        delay: draws the time of one way over the network.
        first_s: virtual second of the first update.
        beside: other chains, whose weights are active and frozen beside this one's; each pull brings them too.
    """

    def __init__(
        self, worker: str, server: Server, learner: Learner, run: Run, clock: Clock,
        delay: Callable[[], float], first_s: float, beside: Sequence[Server] = (),
    ) -> None:  # fmt: skip
        self.server, self.learner = server, learner
        self.ledger = Ledger(base=server.pulled(), meta=server.meta, run=make_run(1, "00000001"))
        learner.flat.copy_(self.ledger.base)
        self.n_steps = 0
        self._worker, self._run, self._clock, self._delay = worker, run, clock, delay
        self._due_s = first_s
        self._changes: list[Change] = []
        self._trained = Trained()
        self._rest = False  # the training has ended, and what it left is to be published
        self._beside = beside
        self._seen = [other.pulled() for other in beside]  # since the last boundary

    def settle(self) -> None:
        """Apply what was pulled since the last boundary."""
        if self._seen:
            self.learner.frozen, self._seen = self._seen, []
        for change in self._changes:
            if change.correction is not None:
                self.learner.flat.add_(change.correction)
        self._changes.clear()

    def publish_if_due(self) -> None:
        """Publish the progress if its time has come and no update is on its way."""
        if self._clock.now >= self._due_s - MOMENT_S and not self.ledger.queue and self._trained.steps:
            self._publish()
            while self._due_s <= self._clock.now + MOMENT_S:
                self._due_s += self._run.sync_s

    def step(self) -> None:
        """One optimizer step."""
        step = self.learner.step()
        self.n_steps += 1
        done = self._trained
        self._trained = Trained(
            n_examples=done.n_examples + step.n_examples,
            n_tokens=done.n_tokens + step.n_tokens,
            steps=done.steps + 1,
            loss_sum=done.loss_sum + step.loss,
        )

    def finish(self) -> None:
        """Publish what the training left, now or when the update on its way is decided."""
        if self.ledger.queue:
            self._rest = True
        elif self._trained.steps:
            self._publish()

    def _publish(self) -> None:
        cut = self.ledger.cut(self.learner.flat, self.server.spec.wire_format)
        self.ledger.make_update(cut, self._trained, fingerprint=FINGERPRINT)
        self._trained = Trained()
        self._clock.at(self._clock.now + self._delay(), self._arrive)

    def _arrive(self) -> None:
        header, parts = self.ledger.to_send()
        self.server.decide(self._worker, header, parts)
        self._clock.at(self._clock.now + self._delay(), self._pull)

    def _pull(self) -> None:
        server = self.server
        decided = server.decided[self._worker]
        self._changes.append(self.ledger.observe(server.meta, server.pulled(), decided, now=self._clock.now))
        self._seen = [other.pulled() for other in self._beside]
        if self._rest:
            self._rest = False
            self.settle()
            self.finish()


class Worker:
    """A virtual worker: trains its chains until its time is over, in turn, or all of them at each step."""

    def __init__(
        self,
        plan: WorkerPlan,
        make_chains: Callable[[], list[Chain]],
        clock: Clock,
        *,
        together: bool = False,
    ) -> None:
        self.plan, self._together = plan, together
        self.chains: list[Chain] = []
        self._make, self._clock = make_chains, clock
        self._steps = 0
        clock.at(plan.start_s, self._join)

    def _join(self) -> None:
        self.chains = self._make()
        self._boundary()

    def _boundary(self) -> None:
        for chain in self.chains:
            chain.settle()
        next_s = self.plan.start_s + (self._steps + 1) / self.plan.speed
        if next_s > self.plan.stop_s + MOMENT_S:
            for chain in self.chains:
                chain.finish()
            return
        for chain in self.chains:
            chain.publish_if_due()
        in_turn = [self.chains[self._steps % len(self.chains)]]
        for chain in self.chains if self._together else in_turn:
            chain.step()
        self._steps += 1
        self._clock.at(next_s, self._boundary)


def simulate(
    run: Run, servers: Mapping[str, Server], make: Make, *, watch: Watch | None = None
) -> list[Worker]:
    """Play the whole run; the servers then hold its result, and the workers their books.

    `watch` is called every `sync_s` virtual seconds while a worker trains.
    """
    clock, draw = Clock(), random.Random(f"{run.seed}")

    def delay() -> float:
        return draw.uniform(*run.delay_s)

    def chains_of(plan: WorkerPlan) -> list[Chain]:
        chains = []
        for name in run.chains(plan):
            server = servers[name]
            learner = make(plan, name, torch.empty(server.spec.layout.numel))
            first_s = plan.start_s + draw.uniform(0.0, run.sync_s)  # workers do not start in step
            worker = f"{plan.domain}.{plan.name}" if server.name == GATEWAY else plan.name
            beside = [servers[other] for other in run.beside(name)]
            chains.append(Chain(worker, server, learner, run, clock, delay, first_s, beside))
        return chains

    workers = [
        Worker(plan, lambda plan=plan: chains_of(plan), clock, together=run.scheme == ONE_PASS)
        for plan in run.workers()
    ]
    if watch is not None:
        for number in range(math.ceil(max(plan.stop_s for plan in run.workers()) / run.sync_s) + 1):
            clock.at(number * run.sync_s, lambda: watch(clock.now))
    clock.run()
    return workers


def servers_of(run: Run, make_server: Callable[[str], Server]) -> dict[str, Server]:
    """A server for each chain of the run, the gateway's first."""
    names = {name for plan in run.workers() for name in run.chains(plan)}
    return {name: make_server(name) for name in sorted(names, key=lambda name: (name != GATEWAY, name))}
