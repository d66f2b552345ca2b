"""A dashboard in this process, and federations that it shows, written as aggregators and workers write them."""

import math
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import httpx2

from fedmoe.protocol.lines import AppliedLine, DeadLetter, RulesLine
from fedmoe.protocol.rules import RuleSet
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.lease import Lease
from fedmoe.store.worker import WorkerStore
from fedmoe.tools.dashboard.app import Dashboard
from fedmoe.tools.dashboard.scrape import metrics_routes
from fedmoe.tools.dashboard.settings import DashboardSettings
from fedmoe.tools.dashboard.watcher import Watcher
from fedmoe.tools.http_server import HttpServer
from tests.federation import make_expert
from tests.looking import BEAT


@dataclass(frozen=True, slots=True)
class Board:
    """A running dashboard, in this process or, with its address alone, in another one."""

    url: str
    watcher: Watcher = field(repr=False, default=None)
    dashboard: Dashboard = field(repr=False, default=None)
    listening: socket.socket = field(repr=False, default=None)

    def get(self, path: str, **more: object) -> httpx2.Response:
        """Ask for a path; redirects are not followed."""
        return httpx2.get(f"{self.url}{path}", timeout=20.0, **more)


@contextmanager
def board(
    redis: RedisSettings, *, password: str = "", look_first: bool = True, **settings: object
) -> Iterator[Board]:
    """Run a dashboard that looks at this Redis ten times a second."""
    chosen = DashboardSettings(**({"interval_s": 0.1, "port": 0} | settings))
    watcher, stop = Watcher(redis, interval_s=chosen.interval_s), threading.Event()
    dashboard = Dashboard(watcher, chosen, redis, password=password, more=metrics_routes(redis))
    watcher.is_watched = lambda: True
    if look_first:
        watcher.look()
    server = HttpServer(dashboard.app, chosen.host, chosen.port, proxies=chosen.forwarded_allow_ips)
    thread = threading.Thread(target=watcher.run, args=(stop,), daemon=True)
    thread.start()
    try:
        yield Board(f"http://127.0.0.1:{server.port}", watcher, dashboard, server._socket)
    finally:
        stop.set()
        watcher.connection.cut_off()
        dashboard.hub.close()
        server.stop()
        server.join()
        thread.join()


def hold_lease(connection: Connection, expert: str, *, ttl_ms: int = 60_000) -> None:
    """An aggregator serves the expert for so long."""
    Lease(connection, connection.keys.expert(expert).lease, holder="lab-aggregator", ttl_ms=ttl_ms).hold()


def beat(connection: Connection, expert: str, worker: str, *, ttl_s: float = 60.0, **fields: object) -> None:
    """A heartbeat of a worker."""
    WorkerStore(connection, expert, worker).beat(replace(BEAT, **fields), ttl_s=ttl_s)


def refuse(connection: Connection, expert: str, worker: str, reason: str, *, seq: int = 7) -> None:
    """A dead letter, as an aggregator writes it."""
    letter = DeadLetter(worker=worker, seq=seq, reason=reason)
    connection.client.xadd(connection.keys.expert(expert).dead, letter.to_fields())


def apply(
    connection: Connection, expert: str, n: int, *, workers: tuple[str, ...] = ("alice",), seed: int = 0,
    seconds: float = 600.0, until_s: float = 0.0,
) -> None:  # fmt: skip
    """`n` applied updates in the expert's log and meta, the last one `until_s` seconds ago."""
    random_ = random.Random(seed)
    keys, client = connection.keys.expert(expert), connection.client
    now = time.time() - until_s
    loss = 0.0
    with client.pipeline(transaction=False) as pipe:
        for i in range(1, n + 1):
            worker = workers[random_.randrange(len(workers))]
            loss = 1.2 + 1.4 * math.exp(-3 * i / n) + random_.uniform(-0.08, 0.08)
            measured = {"val_loss": loss + 0.1, "val_version": i - 1, "val_rows": 48} if i % 9 == 0 else {}
            line = AppliedLine(
                version=i, worker=worker, run="1-00000000", seq=i, base_version=i - 1, rules=1, norm=1.0, loss=loss,
                staleness=min(40, int(random_.expovariate(0.5))), factor=1.0, n_examples=32, **measured,
            )  # fmt: skip
            ms = int((now - seconds * (n - i) / n) * 1000)
            pipe.xadd(keys.log, line.to_fields(), id=f"{ms}-{i}")
        pipe.hset(keys.meta, mapping={"version": n, "applied": n, "loss": loss, "staleness_sum": 2 * n})
        pipe.execute()


def apply_one(connection: Connection, expert: str, version: int, worker: str = "alice") -> None:
    """One more applied update, now."""
    keys = connection.keys.expert(expert)
    line = AppliedLine(
        version=version, worker=worker, run="1-00000000", seq=version, base_version=version - 1, rules=1, norm=1.0,
        loss=1.0, staleness=0, factor=1.0, n_examples=32,
    )  # fmt: skip
    connection.client.xadd(keys.log, line.to_fields())
    connection.client.hset(keys.meta, mapping={"version": version, "applied": version})


def change_rules(connection: Connection, expert: str, changed: str) -> None:
    """A line of the log that says so."""
    line = RulesLine(version=3, changed=changed, ended=RuleSet())
    connection.client.xadd(connection.keys.expert(expert).log, line.to_fields())


def lively(connection: Connection, *, experts: int = 3, workers: int = 3, updates: int = 300) -> list[str]:
    """A federation in which all is well, but for a refusal."""
    names = ["docs_expert", "python_expert", "sql_expert"][:experts]
    names += [f"expert_{i:02}" for i in range(len(names), experts)]
    for seed, name in enumerate(names):
        make_expert(connection, name)
        own = tuple(f"{name.partition('_')[0]}-{chr(97 + i % 26)}{i // 26 or ''}" for i in range(workers))
        apply(connection, name, updates, workers=own, seed=seed)
        hold_lease(connection, name)
        for i, worker in enumerate(own):
            beat(
                connection,
                name,
                worker,
                step=400 + 7 * i,
                tokens_per_s=800.0 + 31 * i,
                base_version=updates - i,
            )
    return names
