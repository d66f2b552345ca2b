"""Clients that go and pause together, and rounds in which contestants take turns."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol, Self

from ops.bench.processes import CONTEXT, BenchError, Processes
from ops.bench.result import Result, figure, ratio

WARM_S = 0.5  # of each turn before it counts
LONGER_S = 30.0  # a turn lasts at most, until it has an update
REMEMBERED = 4096  # of a client's updates, how long they took


class Seats:
    """Shared with the client processes: whether they may go, what each has done, and whether it is at work.

    Args:
        n: number of client processes.
    """

    def __init__(self, n: int) -> None:
        self.go = CONTEXT.Event()
        self._done = CONTEXT.Array("q", n, lock=False)
        self._seconds = CONTEXT.Array("d", n * REMEMBERED, lock=False)
        self._busy = CONTEXT.Array("b", n, lock=False)

    def wait_for_go(self, index: int) -> None:
        """Client: begin the next update, as soon as clients may."""
        if not self.go.is_set():
            self._busy[index] = 0
            self.go.wait()
            self._busy[index] = 1

    def report(self, index: int, *, busy: bool) -> None:
        """Client: whether it has an update in flight, or is about to make one."""
        self._busy[index] = busy

    def count(self, index: int, seconds: float = math.nan) -> None:
        """Client: one more update was made, all the way to the pull that shows it, in so many seconds."""
        self._seconds[index * REMEMBERED + self._done[index] % REMEMBERED] = seconds
        self._done[index] += 1

    @property
    def done(self) -> list[int]:
        """Updates so far, by client."""
        return list(self._done)

    def seconds_since(self, before: Sequence[int]) -> list[float]:
        """What each update took since `done` was so; of each client the last ones."""
        return [
            self._seconds[index * REMEMBERED + number % REMEMBERED]
            for index, (first, end) in enumerate(zip(before, self.done, strict=True))
            for number in range(max(first, end - REMEMBERED), end)
        ]

    @property
    def resting(self) -> bool:
        """True if every client waits for its go."""
        return not any(self._busy)


@dataclass(frozen=True, slots=True)
class Sample:
    """One turn of one contestant.

    Args:
        cpu_s: CPU seconds, by role; pages: new pages of memory that the kernel gave the processes, by role.
        update_s: what single updates took for their clients.
    """

    updates: int
    seconds: float
    cpu_s: Mapping[str, float]
    update_s: Sequence[float] = ()
    pages: Mapping[str, float] = field(default_factory=dict)

    @property
    def per_s(self) -> float:
        """Updates a second."""
        return self.updates / self.seconds

    def cpu_ms(self, *roles: str) -> float:
        """CPU milliseconds an update of these roles; of all processes if none is named."""
        return sum(s for role, s in self.cpu_s.items() if not roles or role in roles) * 1000 / self.updates


class Contestant(ABC):
    """Processes with clients that push and pull. A context manager; subclasses start their processes in `_start`."""

    def __init__(self, name: str, *, n_clients: int = 3) -> None:
        self.name = name
        self.n_clients = n_clients
        self.seats = Seats(n_clients)
        self.processes = Processes(name)

    @abstractmethod
    def _start(self) -> None:
        """Start them."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.processes)
            self._start()
            self.seats.go.set()
            self.processes.until("the first update of every client", lambda: all(self.seats.done))
            self.pause()
            stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.processes.__exit__(*error)

    def pause(self) -> None:
        """Let the clients finish what they have begun, and wait until they have."""
        self.seats.go.clear()
        self.processes.until("the clients to pause", lambda: self.seats.resting)

    def turn(self, seconds: float) -> Sample:
        """Let the clients go for so long, and until one has made an update, after a warming up that does not count.

        Raises:
            BenchError: if a process ends, or no client makes an update.
        """
        self.seats.go.set()
        self.processes.sleep(min(WARM_S, seconds))
        began, before, cpu = time.monotonic(), self.seats.done, self.processes.cpu_s()
        had = self.processes.pages()
        self.processes.sleep(seconds)
        while (updates := sum(self.seats.done) - sum(before)) <= 0:
            if time.monotonic() - began > seconds + LONGER_S:
                raise BenchError(f"{self.name}: no client made an update in {seconds + LONGER_S:g} s")
            self.processes.sleep(0.05)
        took = time.monotonic() - began
        update_s = self.seats.seconds_since(before)
        used = {role: s - cpu[role] for role, s in self.processes.cpu_s().items()}
        pages = {role: n - had[role] for role, n in self.processes.pages().items()}
        self.pause()
        return Sample(updates, took, used, update_s, pages)


class _TakesTurns(Protocol):
    name: str

    def turn(self, seconds: float) -> Sample:
        """As a Contestant's."""
        ...


def side_by_side(
    one: _TakesTurns, other: _TakesTurns, *, rounds: int, seconds: float, rates: str, costs: str
) -> Iterator[Result]:
    """Let two running contestants take turns: updates a second and CPU of each, and the ratios one ÷ other by round.

    `rates` and `costs` are the names of the two ratios.
    """
    samples = take_turns([one, other], rounds=rounds, seconds=seconds)
    per_s = {name: [turn.per_s for turn in turns] for name, turns in samples.items()}
    cpu_ms = {name: [turn.cpu_ms() for turn in turns] for name, turns in samples.items()}
    for name in samples:
        yield figure(f"{name}_updates_per_s", per_s[name], "updates/s")
        yield figure(f"{name}_cpu_ms", cpu_ms[name], "ms/update")
    yield ratio(rates, per_s[one.name], per_s[other.name])
    yield ratio(costs, cpu_ms[one.name], cpu_ms[other.name])


def take_turns(contestants: Sequence[_TakesTurns], *, rounds: int, seconds: float) -> dict[str, list[Sample]]:
    """Every contestant once in each round; their samples by name, one a round.

    Every other round goes backwards, so that none always comes after the same one.
    """
    samples: dict[str, list[Sample]] = {contestant.name: [] for contestant in contestants}
    for number in range(rounds):
        order: Iterable[_TakesTurns] = contestants if number % 2 == 0 else reversed(contestants)
        for contestant in order:
            samples[contestant.name].append(contestant.turn(seconds))
    return samples
