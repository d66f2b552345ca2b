"""What an update costs on a Redis Cluster: three masters and three aggregators, beside one server and one aggregator.

Both have the same six experts, two in the slots of each master, with a worker each. (The merged gateway counts as one
more when aggregators share.) All processes share this machine's cores, so the CPU time of an update is compared, not
how many there are in a second.
"""

from collections.abc import Iterator
from itertools import count
from typing import Any, Self

from fedmoe.protocol.layout import Layout
from fedmoe.settings import RedisSettings
from fedmoe.store.cluster import SLOTS, slot_of
from fedmoe.store.connection import Connection
from ops.bench.adapters import LAYOUTS
from ops.bench.contest import take_turns
from ops.bench.fedmoe_side import DEFAULT_FORMAT, FedMoE, aggregator_command, create_expert, serve_clients
from ops.bench.plan import Plan
from ops.bench.processes import Processes, free_port
from ops.bench.result import Result, figure, ratio

SERVERS = 3
SERVER = ("aggregator", "redis")


def start_cluster(processes: Processes, masters: int) -> str:
    """Start masters without replicas that share the slots evenly, and return the cluster's URL."""
    nodes: list[tuple[str, int, Any]] = []
    for _ in range(masters):
        # The bus listens on port + 10000 by default, which may be no port at all.
        options = ["--cluster-enabled", "yes", "--cluster-port", str(bus := free_port())]
        url = processes.redis(options=options)
        nodes.append((url, bus, Connection(RedisSettings(url=url)).client))
    hosts = [url.removeprefix("redis://").partition("/")[0] for url, _, _ in nodes]
    for number, (_, _, client) in enumerate(nodes):
        begin, end = (SLOTS * n // masters for n in (number, number + 1))
        client.execute_command("CLUSTER ADDSLOTSRANGE", begin, end - 1)
        client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
    for host, (_, bus, _) in zip(hosts, nodes, strict=True):
        nodes[0][2].execute_command("CLUSTER MEET", *host.split(":"), bus)
    processes.until("all nodes to serve all slots", lambda: all(_serves(client) for _, _, client in nodes))
    for _, _, client in nodes:
        client.close()
    return f"cluster://{','.join(hosts)}"


def _serves(client: Any) -> bool:
    return client.execute_command("CLUSTER INFO")["cluster_state"] == "ok"


def even_names(masters: int, each: int) -> list[str]:
    """Names of experts, so many in the slots of each master."""
    keys = Connection(RedisSettings()).keys
    names: list[list[str]] = [[] for _ in range(masters)]
    for number in count():
        name = f"expert{number}"
        those = names[slot_of(keys.expert(name).lease) * masters // SLOTS]
        those += [name] if len(those) < each else []
        if all(len(those) == each for those in names):
            break
    return [name for together in zip(*names, strict=True) for name in together]


class Shared(FedMoE):
    """So many masters and as many aggregators; one server and one aggregator for 1."""

    def __init__(self, name: str, layout: Layout, *, servers: int) -> None:
        super().__init__(name, layout, DEFAULT_FORMAT)
        self.servers = servers
        self.experts = even_names(SERVERS, 2)
        self.workers = [(expert, "worker") for expert in self.experts]
        self._url = ""

    def _start(self) -> None:
        alone = self.servers == 1
        self._url = self.processes.redis() if alone else start_cluster(self.processes, self.servers)
        for expert in self.experts:
            create_expert(self._url, expert, self.spec)
        for _ in range(self.servers):
            self.processes.command("aggregator", *aggregator_command(self._url, self.experts))
        for index in range(self.n_clients):
            mine = self.workers[index :: self.n_clients]
            self.processes.call("clients", serve_clients, self.seats, index, self._url, mine)

    def __enter__(self) -> Self:
        super().__enter__()
        connection = Connection(RedisSettings(url=self._url))
        leases = [connection.keys.expert(name).lease for name in self.experts]

        def holders() -> set[bytes]:
            return {connection.at(key).client.get(key) for key in leases} - {None}

        try:
            self.processes.until("each aggregator to serve", lambda: len(holders()) == self.servers)
        except BaseException:
            self.__exit__()
            raise
        finally:
            connection.close()
        return self


def run(plan: Plan) -> Iterator[Result]:
    """CPU of an update, all processes and without the workers, and the ratios."""
    layout = LAYOUTS[plan.size]
    one = Shared("one_and_one", layout, servers=1)
    three = Shared("cluster", layout, servers=SERVERS)
    with one, three:
        samples = take_turns([one, three], rounds=plan.rounds, seconds=plan.seconds)
    for name, turns in samples.items():
        yield figure(f"{name}_updates_per_s", [turn.per_s for turn in turns], "updates/s")
        for role in turns[0].cpu_s:
            yield figure(f"{name}_cpu_ms_{role}", [turn.cpu_ms(role) for turn in turns], "ms/update")
    for ratio_name, roles in (("cluster_vs_one_cpu", ()), ("cluster_vs_one_server_cpu", SERVER)):
        costs = {name: [turn.cpu_ms(*roles) for turn in turns] for name, turns in samples.items()}
        yield ratio(ratio_name, costs[three.name], costs[one.name])
