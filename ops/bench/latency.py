"""From the training's progress until another worker, which polls every 2 ms, has the weights with it in hand.

The federation is idle: one update at a time, and a pause after each. Both sides read the machine's one monotonic clock.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Self

from fedmoe.protocol.layout import Layout
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.worker import WorkerStore
from ops.bench.adapters import LAYOUTS
from ops.bench.contest import Contestant, Seats, take_turns
from ops.bench.fedmoe_side import DEFAULT_FORMAT, Client, aggregator_command, create_expert, make_spec
from ops.bench.plan import Plan
from ops.bench.processes import CONTEXT, BenchError
from ops.bench.result import Result, percentiles
from producers.pull import pull

EXPERT = "expert"
POLL_S = 0.002
PAUSE_S = 0.05


def publish(seats: Seats, url: str, times: Any) -> None:
    """Body of the publisher: (version, when encoding it began) of each update into `times`."""
    client = Client(url, EXPERT, "publisher")
    while True:
        seats.wait_for_go(0)
        client.train()
        began = time.monotonic()
        client.publish(client.make_update())
        while client.busy:
            time.sleep(max(0.0, client.next_at - time.monotonic()))
            client.turn()
        assert client.decided is not None
        times.put((client.decided[1], began))
        seats.count(0)
        time.sleep(PAUSE_S)


def observe(seats: Seats, url: str, times: Any) -> None:
    """Body of the observer: (version, when the poll that found it began, when its weights were there)."""
    store = WorkerStore(Connection(RedisSettings(url=url)), EXPERT, "observer")
    spec = store.spec()
    known = ""
    while True:
        if not seats.go.is_set() or not known:
            seats.wait_for_go(1)
            known = store.meta().weights_commit  # what was published in the pause was not waited for
        looked = time.monotonic()
        pulled = pull(store, spec, known=known)
        if pulled.weights is None:
            time.sleep(POLL_S)
            continue
        times.put((pulled.meta.version, looked, time.monotonic()))
        known = pulled.meta.weights_commit
        seats.count(1)


class Idle(Contestant):
    """An aggregator, one worker that publishes, another that watches."""

    def __init__(self, name: str, layout: Layout, wire_format: str) -> None:
        super().__init__(name, n_clients=2)
        self.spec = make_spec(layout, wire_format)
        self._published = CONTEXT.SimpleQueue()
        self._seen = CONTEXT.SimpleQueue()
        self._began: dict[int, float] = {}
        self.found_ms: list[float] = []
        self.visible_ms: list[float] = []

    def _start(self) -> None:
        url = self.processes.redis()
        create_expert(url, EXPERT, self.spec)
        self.processes.command("aggregator", *aggregator_command(url, [EXPERT]))
        self.processes.call("observer", observe, self.seats, url, self._seen)
        self.processes.call("publisher", publish, self.seats, url, self._published)

    def __enter__(self) -> Self:
        super().__enter__()
        self.found_ms.clear()  # the first update waited for the aggregator to start
        self.visible_ms.clear()
        return self

    def pause(self) -> None:
        """As any contestant, and note the times of the updates made since the last pause."""
        super().pause()
        while not self._published.empty():
            version, began = self._published.get()
            self._began[version] = began
        while not self._seen.empty():
            version, found, visible = self._seen.get()
            if began := self._began.pop(version, 0.0):
                self.found_ms.append((found - began) * 1000)
                self.visible_ms.append((visible - began) * 1000)


def run(plan: Plan) -> Iterator[Result]:
    """Each format, in turns; the bar is about the default format."""
    idle = {form: Idle(f"idle_{form}", LAYOUTS[plan.size], form) for form in plan.formats}
    with ExitStack() as stack:
        for contestant in idle.values():
            stack.enter_context(contestant)
        take_turns(list(idle.values()), rounds=plan.rounds, seconds=plan.seconds / 2)
    for form, contestant in idle.items():
        if not contestant.visible_ms:
            raise BenchError(f"{contestant.name}: the observer saw none of the updates")
        yield from percentiles(f"publish_to_visible_{form}", contestant.visible_ms)
        yield from percentiles(f"publish_to_found_{form}", contestant.found_ms)
    yield from percentiles("publish_to_visible", idle[DEFAULT_FORMAT].visible_ms)
