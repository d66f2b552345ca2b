"""Aggregators share the experts on a Redis Cluster, too."""

import signal
from contextlib import ExitStack
from pathlib import Path

from consumers.rebalance import Rebalancer
from fedmoe.protocol.assignment import AggregatorBeat
from fedmoe.settings import RedisSettings
from fedmoe.store.aggregators import Aggregators
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from tests.cluster import Cluster

EXPERT = "sql_expert"


def test_heartbeats_alone_that_cannot_be_reached_are_not_waited_for(
    server: EmbeddedRedis, tmp_path: Path
) -> None:
    """An aggregator takes what is free, as if it knew of no other, if only the heartbeats' master is away."""
    with ExitStack() as made:
        cluster = made.enter_context(Cluster(server.server, tmp_path, replicas=0))

        def reach() -> Connection:
            connection = Connection(RedisSettings(url=cluster.url, timeout_s=2.0))
            made.callback(connection.close)
            return connection

        now = 0.0
        own, other = reach(), Aggregators(reach(), holder="other", ttl_ms=10_000)
        other.beat(AggregatorBeat(serves=frozenset({EXPERT})))
        rebalancer = Rebalancer(own, "own", lease_s=2.0, clock=lambda: now)
        rebalancer.assignment.add(EXPERT, ttl_s=2.0, now=now)
        rebalancer.beat()
        assert not rebalancer.assignment.wants(EXPERT, now)
        master = cluster.master_of(own.keys.aggregators)
        master.signal(signal.SIGSTOP)
        made.callback(master.signal, signal.SIGCONT)
        for now, wants in ((0.5, False), (2.0, False), (5.0, True)):
            rebalancer.beat()
            assert rebalancer.assignment.wants(EXPERT, now) is wants
