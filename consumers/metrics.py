"""What an aggregator has done since its start, as metrics; read at each scrape from what it counts anyway."""

from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from consumers.daemon import Aggregator
from consumers.decide import Outcome
from fedmoe.tools.metrics.families import Families
from fedmoe.tools.metrics.table import AGGREGATOR


class AggregatorCollector(Collector):
    """The metrics of an aggregator.

    Args:
        keep_updates: its directory of kept updates, if it has one.

    Attributes:
        daemon: the aggregator; None until it has begun.
    """

    def __init__(self, keep_updates: Path | None) -> None:
        self._keep_updates = keep_updates
        self.daemon: Aggregator | None = None

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        families = Families(AGGREGATOR)
        families.add_disk("keep_updates", self._keep_updates)
        if self.daemon is None:
            return iter(families)
        connections = self.daemon.connections
        families.add("fedmoe_redis_connections_total", sum(one.connections_made for one in connections))
        ends = [one.certificate_ends for one in connections if one.certificate_ends is not None]
        families.add("fedmoe_redis_certificate_expiry_timestamp_seconds", min(ends, default=None))
        for server in self.daemon.servers:
            name, tally = server.name, server.tally
            families.add("fedmoe_aggregator_serving", server.is_serving, name)
            for outcome in Outcome:
                count = tally.outcomes[outcome]
                families.add("fedmoe_aggregator_updates_total", count, name, outcome.value)
            families.add("fedmoe_aggregator_batches_total", tally.batches, name)
            families.add("fedmoe_aggregator_busy_seconds_total", tally.seconds, name)
            families.add("fedmoe_aggregator_problem", bool(server.problems.said), name)
        return iter(families)
