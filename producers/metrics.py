"""What a worker has done since its start, as metrics; read at each scrape from what it counts anyway."""

import time
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from fedmoe.tools.metrics.families import Families
from fedmoe.tools.metrics.table import WORKER
from producers.training import Turn
from producers.worker import Worker


class WorkerCollector(Collector):
    """The metrics of a worker.

    Args:
        state_dir: its state directory, if it has one.
    """

    def __init__(self, worker: Worker, state_dir: Path | None) -> None:
        self._worker = worker
        self._state_dir = state_dir

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        families = Families(WORKER)
        families.add_disk("state_dir", self._state_dir)
        turns = self._worker.turns
        connections = [turn.member.store.connection for turn in turns]
        families.add("fedmoe_redis_connections_total", sum(one.connections_made for one in connections))
        ends = [one.certificate_ends for one in connections if one.certificate_ends is not None]
        families.add("fedmoe_redis_certificate_expiry_timestamp_seconds", min(ends, default=None))
        for turn in turns:
            _add(families, turn)
        return iter(families)


def _add(families: Families, turn: Turn) -> None:
    name, progress, status = turn.expert, turn.progress, turn.member.sync.status
    families.add("fedmoe_training_steps_total", progress.steps, name)
    families.add("fedmoe_training_examples_total", progress.n_examples, name)
    families.add("fedmoe_training_tokens_total", progress.n_tokens, name)
    families.add("fedmoe_training_loss", progress.last.loss if progress.last else None, name)
    families.add("fedmoe_training_tokens_per_second", progress.tokens_per_s, name)
    families.add("fedmoe_sync_version", status.version, name)
    for outcome in ("published", "applied", "refused"):
        families.add("fedmoe_sync_updates_total", getattr(status, outcome), name, outcome)
    families.add("fedmoe_sync_staleness_updates", status.staleness, name)
    age_s = time.monotonic() - status.in_flight_since if status.in_flight else 0.0
    families.add("fedmoe_sync_in_flight_seconds", age_s, name)
    families.add("fedmoe_sync_problem", bool(status.problem), name)
