"""Several aggregators share the experts: evenly; one that comes, goes or stops moves only what must move."""

import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from consumers.aggregator import ExpertServer
from consumers.daemon import Aggregator
from consumers.expert import Expert
from fedmoe.errors import ProtocolError, SpecError
from fedmoe.protocol.assignment import AggregatorBeat
from fedmoe.protocol.federation import findings
from fedmoe.protocol.names import MERGED
from fedmoe.settings import AggregatorSettings, GatewaySettings
from fedmoe.store.change import change_rules_soon
from fedmoe.store.connection import Connection
from fedmoe.store.inspect import Inspector
from fedmoe.store.lease import Lease
from fedmoe.store.permissions import AGGREGATOR, acl_rules
from fedmoe.tools.metrics.federation import federation_families
from tests.federation import ScriptedWorker, make_expert, small_spec
from tests.guarded import KEYS, rights_of
from tests.processes import eventually, fedmoe_here, running, terminate

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]
LEASE_S = 2.0
EXPERTS = [f"e{n}" for n in range(7)]
ALL = [*EXPERTS, MERGED]


def holders(connection: Connection) -> dict[str, str]:
    """Expert → the holder of its lease, without those that nobody serves."""
    held = connection.client.mget([connection.keys.expert(name).lease for name in ALL])
    return {name: holder.decode() for name, holder in zip(ALL, held, strict=True) if holder}


def counts(connection: Connection, n_aggregators: int) -> list[int]:
    """How many each serves, in rising order; raises unless all are served by so many."""
    count = Counter(holders(connection).values())
    assert (sum(count.values()), len(count)) == (len(ALL), n_aggregators), count
    return sorted(count.values())


class Watch:
    """Looks at the leases all the time: when an expert was first seen with another holder."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.before = holders(connection)
        self.moved: dict[str, tuple[str, float]] = {}

    def until(self, true: Callable[[], bool], timeout_s: float) -> None:
        began = time.monotonic()
        while time.monotonic() < began + timeout_s:
            for expert, holder in holders(self._connection).items():
                if holder != self.before[expert]:
                    self.moved.setdefault(expert, (holder, time.monotonic() - began))
            if true():
                return
            time.sleep(0.02)
        raise AssertionError(f"after {timeout_s:g} s: {self.moved}, {holders(self._connection)}")

    @property
    def slowest_s(self) -> float:
        return max(at for _, at in self.moved.values())


class Processes:
    """Real aggregators, and a worker of each expert that publishes now and then."""

    def __init__(self, connection: Connection, directory: Path, stack: ExitStack) -> None:
        self.connection = connection
        self._directory, self._stack = directory, stack
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        for name in EXPERTS:
            make_expert(connection, name)
        self.workers = {name: ScriptedWorker(connection, small_spec(), "w", name) for name in EXPERTS}
        self.pushed = 0

    def start(self) -> str:
        """Start one; its name, once it serves."""
        log = self._directory / f"{len(self.started)}.log"
        process = self._stack.enter_context(
            running(
                log, "aggregator", "run", "--redis", self.connection.settings.url, "--lease", str(LEASE_S),
                "--block-ms", "100", "--gateway-interval", "0.2", "--expert", EXPERTS[0],
            )
        )  # fmt: skip

        def name() -> str | None:
            found = [one for one in holders(self.connection).values() if f"-{process.pid}-" in one]
            return found[0] if found else None

        started = eventually("it serves an expert", name)
        self.started[started] = process
        return str(started)

    def updates_are_applied(self) -> None:
        """One update of each expert, exactly once."""
        for worker in self.workers.values():
            worker.pull()
            worker.push(1.0)
        self.pushed += 1
        for name in EXPERTS:
            meta = self.connection.keys.expert(name).meta
            eventually(
                "it is applied",
                lambda m=meta: self.connection.client.hget(m, "version") == str(self.pushed).encode(),
            )


def test_processes_that_come_go_and_stop(connection: Connection, tmp_path: Path) -> None:
    """Three aggregators, seven experts and the merged gateway; none served by a survivor moves."""
    with ExitStack() as stack:
        processes = Processes(connection, tmp_path, stack)
        names = [processes.start() for _ in range(3)]
        eventually("an even share", lambda: counts(connection, 3) == [2, 3, 3])
        processes.updates_are_applied()

        # One is killed: what it served, and nothing else, moves within a lease.
        victim = names[0]
        time.sleep(LEASE_S / 4)  # all have seen the present state
        watch = Watch(connection)
        its = {expert for expert, holder in watch.before.items() if holder == victim}
        processes.started[victim].kill()
        watch.until(lambda: its <= watch.moved.keys(), 3 * LEASE_S)
        assert watch.slowest_s < LEASE_S + 1.0  # a second for a busy machine
        watch.until(lambda: counts(connection, 2) == [4, 4], LEASE_S)
        assert watch.moved.keys() == its
        processes.updates_are_applied()

        # One is added: it gets its share, and nothing else moves.
        watch = Watch(connection)
        names[0] = processes.start()
        watch.until(lambda: sorted(Counter(holders(connection).values()).values()) == [2, 3, 3], 3 * LEASE_S)
        assert {holder for holder, _ in watch.moved.values()} == {names[0]}
        assert len(watch.moved) == 2
        processes.updates_are_applied()

        # One is stopped, as if its machine was suspended; the others take what it served, and it takes nothing back by
        # force when it wakes.
        stopped = names[1]
        time.sleep(LEASE_S / 4)
        watch = Watch(connection)
        its = {expert for expert, holder in watch.before.items() if holder == stopped}
        processes.started[stopped].send_signal(signal.SIGSTOP)
        watch.until(lambda: its <= watch.moved.keys(), 3 * LEASE_S)
        assert watch.slowest_s < LEASE_S + 1.0
        assert watch.moved.keys() == its
        processes.updates_are_applied()
        processes.started[stopped].send_signal(signal.SIGCONT)
        eventually("an even share again", lambda: counts(connection, 3) == [2, 3, 3], timeout_s=10 * LEASE_S)
        processes.updates_are_applied()

        # All see who lives.
        seen = fedmoe_here("status", "--redis", connection.settings.url).stdout
        for name in names:
            assert f"aggregator {name}: serves " in seen

        # One is told to stop: the others need not wait for the end of its leases.
        watch = Watch(connection)
        its = {expert for expert, holder in watch.before.items() if holder == stopped}
        terminate(processes.started[stopped])
        watch.until(lambda: its <= watch.moved.keys(), LEASE_S)
        processes.updates_are_applied()


# ---- in this process


@contextmanager
def sharing(connection: Connection, *names: str, lease_s: float = 1.0) -> Iterator[dict[str, Aggregator]]:
    """The daemons of these names, in threads."""
    stop = threading.Event()
    daemons = {
        name: Aggregator(
            connection.settings, [], AggregatorSettings(lease_s=lease_s, block_ms=50),
            GatewaySettings(interval_s=0.1), holder=name,
        )
        for name in names
    }  # fmt: skip
    threads = [threading.Thread(target=daemon.run, args=(stop,)) for daemon in daemons.values()]
    for thread in threads:
        thread.start()
    try:
        yield daemons
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.fixture
def experts(connection: Connection) -> dict[str, Expert]:
    return {name: make_expert(connection, name) for name in EXPERTS}


def test_who_lives_is_shown(connection: Connection, experts: dict[str, Expert]) -> None:
    """By status, metrics and JSON; those that have left are gone at once."""
    with sharing(connection, "one", "two"):
        eventually("an even share", lambda: counts(connection, 2) == [4, 4])

        def is_shown() -> bool:
            seen = Inspector(connection).federation()
            serves = {one.name: len(one.serves) for one in seen.aggregators}
            return serves == {"one": 4, "two": 4}

        eventually("the heartbeats say so", is_shown)
        seen = Inspector(connection).federation()
        assert {e: one.name for one in seen.aggregators for e in one.serves} == holders(connection)
        families = {family.name: family for family in federation_families(seen)}
        samples = families["fedmoe_aggregator_served_experts"].samples
        assert {sample.labels["aggregator"]: sample.value for sample in samples} == {"one": 4, "two": 4}
    assert Inspector(connection).federation().aggregators == ()
    assert connection.client.exists(connection.keys.aggregators) == 0


@pytest.mark.parametrize(
    "error", [ProtocolError("too old", about="protocol"), SpecError("no room", about="disk")]
)
def test_what_one_cannot_serve_another_does(
    connection: Connection, experts: dict[str, Expert], monkeypatch: pytest.MonkeyPatch, error: SpecError
) -> None:
    """One of two lacks something that the other has; it says so, and the other serves the expert."""
    load = ExpertServer._load

    def failing(server: ExpertServer) -> list:
        if server.name == "e0" and server._holder == "one":
            raise error
        return load(server)

    monkeypatch.setattr(ExpertServer, "_load", failing)
    worker = ScriptedWorker(connection, small_spec(), "w", "e0")
    with sharing(connection, "one"):
        worker.push(1.0)
        time.sleep(0.5)
        with sharing(connection, "two"):
            eventually("it is applied", lambda: experts["e0"].store.load().meta.version == 1, timeout_s=10)
            assert holders(connection)["e0"] == "two"
            eventually("an even share", lambda: counts(connection, 2) == [4, 4])


def test_a_hanging_thread_keeps_no_expert_from_being_served(
    connection: Connection, experts: dict[str, Expert], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heartbeats go on; that its thread does not move is in them."""
    hangs, free = threading.Event(), threading.Event()
    turn = ExpertServer.turn

    def hanging(server: ExpertServer, stop: threading.Event) -> bool:
        if server.name == "e0" and server._holder == "one":
            hangs.set()
            free.wait()
        return turn(server, stop)

    worker = ScriptedWorker(connection, small_spec(), "w", "e0")
    with sharing(connection, "one"):
        eventually("the lease", lambda: holders(connection)["e0"] == "one")
        monkeypatch.setattr(ExpertServer, "turn", hanging)
        assert hangs.wait(5)
        try:
            with sharing(connection, "two"):
                worker.push(1.0)
                eventually(
                    "it is applied", lambda: experts["e0"].store.load().meta.version == 1, timeout_s=10
                )
                assert holders(connection)["e0"] == "two"
                eventually("the others are shared", lambda: counts(connection, 2) == [4, 4])
        finally:
            free.set()


def test_a_slow_one_gives_up_what_it_cannot_keep_up_with(
    connection: Connection, experts: dict[str, Expert], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates of one expert wait for it too long: a faster one gets that expert, and an operator is told."""
    decide = Expert.decide

    def slowly(expert: Expert, *rest: Any) -> Any:
        if expert.store.name == "e0" and expert._aggregator == "one":
            time.sleep(0.35)  # so the batch takes more than two leases, and than three of the sync intervals
        return decide(expert, *rest)

    monkeypatch.setattr(Expert, "decide", slowly)
    change_rules_soon(experts["e0"].store, {"sync_interval": 0.1})
    workers = [ScriptedWorker(connection, small_spec(), f"w{n}", "e0") for n in range(8)]
    with sharing(connection, "one"):
        eventually("the lease", lambda: holders(connection)["e0"] == "one")
        with sharing(connection, "two"):
            eventually("an even share", lambda: counts(connection, 2) == [4, 4])
            assert holders(connection)["e0"] == "one"
            for worker in workers:
                worker.push(1.0)
            eventually("the faster one has it", lambda: holders(connection)["e0"] == "two", timeout_s=20)
            told = eventually(
                "a finding",
                lambda: [line for line in findings(Inspector(connection).federation()) if "keep up" in line],
            )
            assert told[0].startswith("aggregator one could not keep up")
            eventually("the rest stays", lambda: counts(connection, 2) == [3, 5])
    assert experts["e0"].store.load().meta.version == 8


def test_a_user_of_an_earlier_release_serves_what_is_free(
    connection: Connection, experts: dict[str, Expert]
) -> None:
    """It has no right to the heartbeats: it serves as before, and another one with the right serves the rest."""
    keys = KEYS.aggregators
    rights = tuple(
        right for right in rights_of(AGGREGATOR) if keys not in right.keys and right.command != "TIME"
    )
    connection.client.execute_command("ACL", "SETUSER", "old", "reset", "on", ">pw", *acl_rules(rights))
    socket = connection.settings.url.partition("://")[2]
    try:
        old = Connection(connection.settings.__class__(url=f"unix://old:pw@{socket}"))
        with sharing(old, "old"):
            eventually("it serves all", lambda: counts(connection, 1) == [8])
            with sharing(connection, "new"):
                time.sleep(1.5)
                assert counts(connection, 1) == [8]
            ScriptedWorker(connection, small_spec(), "w", "e0").push(1.0)
            eventually("it is applied", lambda: experts["e0"].store.load().meta.version == 1)
    finally:
        connection.client.execute_command("ACL", "DELUSER", "old")


def test_a_heartbeat_that_somebody_overwrote_stops_nobody(
    connection: Connection, experts: dict[str, Expert]
) -> None:
    """The key is of another type: each serves what is free, until the key is gone."""
    connection.client.set(connection.keys.aggregators, "oops")
    with sharing(connection, "one"):
        eventually("it serves all", lambda: counts(connection, 1) == [8])
        connection.client.delete(connection.keys.aggregators)
        with sharing(connection, "two"):
            eventually("an even share", lambda: counts(connection, 2) == [4, 4])


def test_a_heartbeat_that_outlives_its_aggregator_keeps_nobody_from_its_experts(
    connection: Connection, experts: dict[str, Expert]
) -> None:
    """The server's clock was set back by half an hour, and the aggregator died at that time."""
    ends = int(time.time() * 1000) + 1_800_000
    beat = AggregatorBeat(serves=frozenset(ALL))
    connection.client.hset(connection.keys.aggregators, "dead", f"{ends} {beat.to_json()}")
    with sharing(connection, "one"):
        eventually("it serves all", lambda: counts(connection, 1) == [8])


def test_nobody_asks_for_the_leases_of_others(
    connection: Connection, experts: dict[str, Expert], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for an expert costs the server nothing: the heartbeat says when it is time."""
    renew = Lease.renew
    refused: Counter[str] = Counter()

    def counted(lease: Lease) -> bool:
        is_held = renew(lease)
        refused[lease._holder] += not is_held
        return is_held

    monkeypatch.setattr(Lease, "renew", counted)
    with sharing(connection, "one", "two"):
        eventually("an even share", lambda: counts(connection, 2) == [4, 4])
        time.sleep(0.5)
        refused.clear()
        time.sleep(2.0)
        assert refused.total() == 0
