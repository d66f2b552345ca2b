"""The aggregator daemon: one thread per expert, one for the gateway, one for the list of experts, one for heartbeats.

All aggregators that live share the experts (see `fedmoe.protocol.assignment`). The thread of an expert that another
aggregator serves only waits.

The experts share the threads that fold and pack large updates.

Each expert has its own chain of commits, in its own Cluster slot, so its thread shares no data with the others, and a
problem with one expert does not stop another.
"""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from consumers.aggregator import ExpertServer
from consumers.gateway.builder import GatewayBuilder
from consumers.rebalance import Rebalancer
from fedmoe.errors import FedMoEError
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.names import is_expert
from fedmoe.settings import AggregatorSettings, GatewaySettings, RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.util.threads import ALONE, Threads, n_cores

logger = logging.getLogger(__name__)

LOOK_FOR_ADDED_S = 2.0


class Aggregator:
    """Serves its share of the experts of a federation and the gateway, each with its own thread and connection.

    It also serves experts that are added to the federation later.

    Args:
        experts: to serve first.
        holder: unique name of this process.
    """

    def __init__(
        self,
        redis: RedisSettings,
        experts: Sequence[str],
        settings: AggregatorSettings,
        gateway: GatewaySettings,
        *,
        holder: str,
    ) -> None:
        self._redis = redis
        self._settings = settings
        self._holder = holder
        self._left = settings.max_updates
        self._enough = threading.Event()
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._connections: dict[str, Connection] = {}
        self._threads: dict[str, threading.Thread] = {}  # of the experts
        self._servers: dict[str, ExpertServer] = {}
        self._experts = list(experts)
        n_threads = settings.threads or n_cores()
        self._folding = ALONE if n_threads == 1 else Threads(ThreadPoolExecutor(n_threads, "fold"), n_threads)
        self._list = GatewayStore(self._connect("list of experts"))
        # With --burst it decides whatever waits and is free, and ends: there is nothing to share.
        self._rebalancer = (
            None
            if settings.burst
            else Rebalancer(self._connect("heartbeat"), holder, lease_s=settings.lease_s)
        )
        self._beats: threading.Thread | None = None
        self._gateway = GatewayBuilder(
            self._connect("gateway"),
            gateway,
            holder=holder,
            lease_s=settings.lease_s,
            rebalancer=self._rebalancer,
            served=self._weights,
        )

    def _weights(self, name: str, commit: str) -> AdapterBuffer | None:
        """A copy of the weights of an expert that this process serves, if they are of this weights commit."""
        retained = server.retained if (server := self._servers.get(name)) else None
        return retained.settled.copy(commit) if retained else None

    @property
    def servers(self) -> list[ExpertServer]:
        """The servers of all experts; any thread may ask."""
        return list(self._servers.values())

    @property
    def connections(self) -> list[Connection]:
        """All connections; any thread may ask."""
        return list(self._connections.values())

    def _connect(self, whose: str) -> Connection:
        if before := self._connections.get(whose):  # the expert was removed and created again
            before.close()
        self._connections[whose] = Connection(self._redis)
        return self._connections[whose]

    def _count(self, decided: int) -> None:
        if not self._settings.max_updates:
            return
        with self._lock:
            self._left -= decided
            if self._left <= 0:
                self._enough.set()

    def cut_off(self) -> None:
        """Called from another thread after a stop: commands that wait for Redis fail. Uncommitted entries stay."""
        for connection in self.connections:
            connection.cut_off()

    def _serve(self, name: str) -> None:
        connection = self._connect(f"expert {name}")
        server = ExpertServer(
            connection,
            name,
            self._settings,
            holder=self._holder,
            rebalancer=self._rebalancer,
            decided=self._count,
            threads=self._folding,
        )
        self._servers[name] = server
        self._threads[name] = threading.Thread(target=self._run, args=(server,), name=name, daemon=True)
        self._threads[name].start()

    def _run(self, server: ExpertServer) -> None:
        server.run(self._ending)
        if self._rebalancer:
            self._rebalancer.assignment.remove(server.name)  # an operator removed it

    def _watch_list(self) -> None:
        while not self._ending.wait(LOOK_FOR_ADDED_S):
            self._serve_listed()

    def _serve_listed(self) -> None:
        """Serve every listed expert that is not served yet: one added, or one removed and created again."""
        try:
            listed = self._list.experts()
        except FedMoEError as error:  # the threads of experts and gateway report the problem
            logger.debug("the list of experts cannot be read: %s", error)
            return
        for name in listed:
            if is_expert(name) and not self._is_served(name):
                logger.info("%s: found this expert in the list of experts; serving it too", name)
                self._serve(name)

    def _is_burst_over(self) -> bool:
        return self._settings.burst and not any(self._is_served(name) for name in self._threads)

    def _is_served(self, name: str) -> bool:
        return name in self._threads and self._threads[name].is_alive()

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set; the gateway is rebuilt once more after the experts' threads have ended."""
        gateway_stop = threading.Event()
        gateway = threading.Thread(
            target=self._gateway.run, args=(gateway_stop,), name="merged gateway", daemon=True
        )
        watch = threading.Thread(target=self._watch_list, name="list of experts", daemon=True)
        if self._rebalancer:
            self._rebalancer.beat()
            self._beats = threading.Thread(
                target=self._rebalancer.run, args=(self._ending,), name="heartbeat", daemon=True
            )
            self._beats.start()
        for name in self._experts:
            self._serve(name)
        self._serve_listed()
        gateway.start()
        if not self._settings.burst:
            watch.start()
        while not (stop.wait(0.1) or self._enough.is_set() or self._is_burst_over()):
            pass
        self._end(watch)
        gateway_stop.set()
        gateway.join()

    def _end(self, watch: threading.Thread) -> None:
        self._ending.set()
        if self._rebalancer and self._beats:
            self._beats.join()
            self._rebalancer.leave()
        if watch.ident is not None:
            watch.join()
        for thread in self._threads.values():
            thread.join()
