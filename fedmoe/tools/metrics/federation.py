"""A federation as metrics: what `fedmoe status --json` shows, for `fedmoe metrics` and the dashboard's /metrics."""

import logging
import threading
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from fedmoe.errors import RedisUnavailableError
from fedmoe.protocol.federation import ExpertView, Federation, WorkerView, findings
from fedmoe.tools.metrics.families import Families
from fedmoe.tools.metrics.table import FEDERATION

OUTCOMES = ("applied", "refused", "duplicate", "undecidable", "garbage")
HOW = frozenset(
    ("finished", "stopped", "refused", "failed", "vanished")
)  # how workers leave; any other is unknown

logger = logging.getLogger(__name__)


class FederationCollector:
    """Reads the federation at each scrape; one scrape at a time, because a connection is for one thread.

    Names are those of `Federation`, so they are printable and bounded.

    Args:
        read: reads the federation, as `Inspector.federation`; it may raise RedisUnavailableError.
    """

    def __init__(self, read: Callable[[], Federation]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._problem = ""

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment; without Redis only that it is away."""
        with self._lock:
            try:
                federation = self._read()
            except RedisUnavailableError as error:
                self._log(str(error))
                families = Families(FEDERATION)
                families.add("fedmoe_redis_up", 0)
            else:
                self._problem = ""
                families = federation_families(federation)
        return iter(families)

    def _log(self, problem: str) -> None:
        """Say once why there are no other metrics."""
        if problem != self._problem:
            self._problem = problem
            logger.warning("%s", problem)


def federation_registry(read: Callable[[], Federation]) -> CollectorRegistry:
    """A registry of its own with the federation's metrics, to be served by `exposition` or a `MetricsServer`."""
    registry = CollectorRegistry()
    registry.register(FederationCollector(read))
    return registry


def federation_families(federation: Federation) -> Families:
    """The metrics of a federation."""
    families = Families(FEDERATION)
    server, merged = federation.server, federation.merged
    families.add("fedmoe_redis_up", 1)
    families.add("fedmoe_redis_memory_used_bytes", server.used_memory)
    families.add("fedmoe_redis_memory_max_bytes", server.max_memory)
    families.add("fedmoe_redis_persistence_ok", server.persists)
    families.add("fedmoe_redis_certificate_expiry_timestamp_seconds", server.certificate_ends)
    families.add("fedmoe_findings", sum(1 for _ in findings(federation)))
    for expert in federation.experts:
        _add_expert(families, expert)
        families.add(
            "fedmoe_expert_workers", len(expert.workers) if federation.sees_workers else None, expert.name
        )
        for worker in expert.workers:
            _add_worker(families, worker)
    for one in federation.aggregators:
        families.add("fedmoe_aggregator_served_experts", len(one.serves), one.name)
        families.add("fedmoe_aggregator_overdue_experts", len(one.overdue), one.name)
    families.add("fedmoe_gateway_exists", merged.exists if merged.is_known else None)
    if merged.exists:
        families.add("fedmoe_gateway_outdated_experts", len(merged.outdated))
        families.add("fedmoe_gateway_updated_timestamp_seconds", merged.updated_at)
        families.add("fedmoe_gateway_relative_error_ratio", merged.relative_error)
    families.add("fedmoe_gateway_fit_loss", merged.fit.loss if merged.fit else None)
    return families


def _add_expert(families: Families, expert: ExpertView) -> None:
    name = expert.name
    if meta := expert.meta:
        families.add("fedmoe_expert_version", meta.version, name)
        for outcome in OUTCOMES:
            families.add("fedmoe_expert_updates_total", getattr(meta, outcome), name, outcome)
        families.add("fedmoe_expert_staleness_updates_total", meta.staleness_sum, name)
        families.add("fedmoe_expert_examples_total", meta.n_examples, name)
        families.add("fedmoe_expert_tokens_total", meta.n_tokens, name)
        families.add("fedmoe_expert_training_loss", meta.loss, name)
        families.add("fedmoe_expert_held", bool(meta.rules.held), name)
    for metric, value in (
        ("fedmoe_expert_last_update_age_seconds", expert.last_update_s),
        ("fedmoe_expert_waiting_entries", expert.waiting),
        ("fedmoe_expert_pending_entries", expert.pending),
        ("fedmoe_expert_served", None if expert.lease is None else expert.lease != ""),
        ("fedmoe_expert_problems", len(expert.problems)),
        ("fedmoe_expert_dead_letters", expert.dead),
        ("fedmoe_expert_weights_bytes", expert.weights_bytes),
        ("fedmoe_expert_gateway_weight", expert.gateway_weight),
        ("fedmoe_expert_best_version", expert.best_version),
    ):
        families.add(metric, value, name)
    for curve in expert.curves:
        families.add("fedmoe_worker_validation_loss", curve.last, name, curve.worker, "last")
        families.add("fedmoe_worker_validation_loss", curve.best, name, curve.worker, "best")
        families.add("fedmoe_worker_validation_worse", curve.is_worse, name, curve.worker)
    for gone in expert.left:
        how = gone.how if gone.how in HOW else "unknown"
        families.add("fedmoe_worker_left_age_seconds", gone.ago_s, name, gone.name, how)


def _add_worker(families: Families, worker: WorkerView) -> None:
    for metric, value in (
        ("fedmoe_worker_heartbeat_age_seconds", worker.last_seen_s),
        ("fedmoe_worker_problem", bool(worker.problem)),
        ("fedmoe_worker_steps_total", worker.step),
        ("fedmoe_worker_training_loss", worker.loss),
        ("fedmoe_worker_tokens_per_second", worker.tokens_per_s),
        ("fedmoe_worker_behind_updates", worker.behind),
        ("fedmoe_worker_staleness_updates", worker.staleness),
        ("fedmoe_worker_in_flight", None if worker.in_flight is None else worker.in_flight > 0),
        ("fedmoe_worker_published_updates_total", worker.published),
        ("fedmoe_worker_refused_updates_total", worker.refused),
    ):
        families.add(metric, value, worker.expert, worker.name)
