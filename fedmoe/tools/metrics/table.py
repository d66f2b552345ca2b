"""Every metric, declared once: `/metrics` and docs/monitoring.md come from here. Pure.

python -m fedmoe.tools.metrics.table      prints the tables of the page
"""

from dataclasses import dataclass

COUNTER, GAUGE = "counter", "gauge"
FEDERATION, AGGREGATOR, WORKER = "federation", "aggregator", "worker"
ALL = (FEDERATION, AGGREGATOR, WORKER)
TITLES = {
    FEDERATION: "`fedmoe metrics`, and the dashboard: the federation, read from Redis at each scrape",
    AGGREGATOR: "`fedmoe aggregator run --metrics-port`: what this process has done since its start",
    WORKER: "`fedmoe worker run --metrics-port`: what this process has done since its start",
}


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: its name with unit, kind, help, labels, and which kinds of process have it."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    of: tuple[str, ...] = (FEDERATION,)


_E, _EW = ("expert",), ("expert", "worker")

METRICS = (
    Metric("fedmoe_build_info", GAUGE, "1; the label is the release of FedMoE.", ("version",), ALL),
    # Of the Redis
    Metric("fedmoe_redis_up", GAUGE, "1 if Redis answers and its experts can be read, else 0."),
    Metric("fedmoe_redis_memory_used_bytes", GAUGE, "Memory that Redis uses."),
    Metric("fedmoe_redis_memory_max_bytes", GAUGE, "Bound of that memory (maxmemory); 0 if there is none."),
    Metric("fedmoe_redis_persistence_ok", GAUGE, "1 if the last writes of Redis to its disk succeeded, else 0."),
    Metric("fedmoe_redis_certificate_expiry_timestamp_seconds", GAUGE,
           "End of the certificate of Redis or of its CA, whichever is first, as seen by this process; over TLS only.",
           (), ALL),
    Metric("fedmoe_redis_connections_total", COUNTER, "Connections to Redis that this process has made.",
           (), (AGGREGATOR, WORKER)),
    # Of each expert
    Metric("fedmoe_findings", GAUGE, "Number of findings that `fedmoe status` prints."),
    Metric("fedmoe_expert_version", GAUGE, "Version of the expert.", _E),
    Metric("fedmoe_expert_updates_total", COUNTER,
           "Updates by outcome: applied, refused, duplicate, undecidable, garbage.", ("expert", "outcome")),
    Metric("fedmoe_expert_staleness_updates_total", COUNTER, "Sum of the staleness of all applied updates.", _E),
    Metric("fedmoe_expert_examples_total", COUNTER, "Examples that the applied updates were trained on.", _E),
    Metric("fedmoe_expert_tokens_total", COUNTER, "Tokens that the applied updates were trained on.", _E),
    Metric("fedmoe_expert_training_loss", GAUGE, "Training loss of the last applied update, in nats per token.", _E),
    Metric("fedmoe_expert_last_update_age_seconds", GAUGE, "Time since the last update was applied.", _E),
    Metric("fedmoe_expert_waiting_entries", GAUGE, "Entries on the stream of the expert, read or not.", _E),
    Metric("fedmoe_expert_pending_entries", GAUGE, "Entries that an aggregator read and did not commit.", _E),
    Metric("fedmoe_expert_served", GAUGE, "1 if an aggregator holds the lease of the expert, else 0.", _E),
    Metric("fedmoe_expert_held", GAUGE, "1 if the expert is held, else 0.", _E),
    Metric("fedmoe_expert_problems", GAUGE, "Problems of the expert: damage, and what its aggregators report.", _E),
    Metric("fedmoe_expert_dead_letters", GAUGE, "Dead letters of the expert that Redis holds.", _E),
    Metric("fedmoe_expert_workers", GAUGE, "Workers of the expert with a heartbeat.", _E),
    Metric("fedmoe_expert_weights_bytes", GAUGE, "Size of the weights.", _E),
    Metric("fedmoe_expert_gateway_weight", GAUGE, "Weight of the expert in the merged gateway.", _E),
    Metric("fedmoe_expert_best_version", GAUGE, "Version that is best by the validation losses of the workers.", _E),
    # Of each worker, as its heartbeat tells
    Metric("fedmoe_worker_heartbeat_age_seconds", GAUGE, "Time since the last heartbeat.", _EW),
    Metric("fedmoe_worker_problem", GAUGE, "1 if the worker reports a problem, else 0.", _EW),
    Metric("fedmoe_worker_steps_total", COUNTER, "Optimizer steps of the worker.", _EW),
    Metric("fedmoe_worker_training_loss", GAUGE, "Training loss of its last step, in nats per token.", _EW),
    Metric("fedmoe_worker_tokens_per_second", GAUGE, "Speed of its training.", _EW),
    Metric("fedmoe_worker_behind_updates", GAUGE, "Updates that were applied since its last pull.", _EW),
    Metric("fedmoe_worker_staleness_updates", GAUGE, "Staleness of its last decided update.", _EW),
    Metric("fedmoe_worker_in_flight", GAUGE, "1 while it has an undecided update, else 0.", _EW),
    Metric("fedmoe_worker_published_updates_total", COUNTER, "Updates that the worker has published.", _EW),
    Metric("fedmoe_worker_refused_updates_total", COUNTER, "Updates of the worker that were refused.", _EW),
    Metric("fedmoe_worker_validation_loss", GAUGE, "Validation loss, the newest (last) and the lowest (best).",
           ("expert", "worker", "which")),
    Metric("fedmoe_worker_validation_worse", GAUGE, "1 if its validation loss is worse, else 0.", _EW),
    Metric("fedmoe_worker_left_age_seconds", GAUGE,
           "Time since a worker left, and how: finished, stopped, refused, failed, vanished, unknown.",
           ("expert", "worker", "how")),
    # Of each aggregator, as its heartbeat tells
    Metric("fedmoe_aggregator_served_experts", GAUGE, "Experts that the aggregator serves, with the merged gateway.",
           ("aggregator",)),
    Metric("fedmoe_aggregator_overdue_experts", GAUGE,
           "Experts of these with updates that waited for several sync intervals.", ("aggregator",)),
    # Of the merged gateway
    Metric("fedmoe_gateway_exists", GAUGE, "1 if there is a merged gateway, else 0."),
    Metric("fedmoe_gateway_outdated_experts", GAUGE, "Experts that changed since it was built."),
    Metric("fedmoe_gateway_updated_timestamp_seconds", GAUGE, "When it was built."),
    Metric("fedmoe_gateway_relative_error_ratio", GAUGE, "Distance to the exact weighted sum of the experts."),
    Metric("fedmoe_gateway_fit_loss", GAUGE, "Loss of its fit on validation rows, in nats per token."),
    # Of an aggregator
    Metric("fedmoe_aggregator_serving", GAUGE, "1 if this process serves the expert, 0 if another one does.", _E,
           (AGGREGATOR,)),
    Metric("fedmoe_aggregator_updates_total", COUNTER,
           "Updates that this process has decided: applied, refused, duplicate, undecidable.",
           ("expert", "outcome"), (AGGREGATOR,)),
    Metric("fedmoe_aggregator_batches_total", COUNTER, "Batches of entries that it has committed.", _E, (AGGREGATOR,)),
    Metric("fedmoe_aggregator_busy_seconds_total", COUNTER, "Time that these batches took, from read to commit.", _E,
           (AGGREGATOR,)),
    Metric("fedmoe_aggregator_problem", GAUGE, "1 while it has a problem with the expert, else 0.", _E, (AGGREGATOR,)),
    # Of a worker
    Metric("fedmoe_training_steps_total", COUNTER, "Optimizer steps since the start.", _E, (WORKER,)),
    Metric("fedmoe_training_examples_total", COUNTER, "Examples trained on since the start.", _E, (WORKER,)),
    Metric("fedmoe_training_tokens_total", COUNTER, "Tokens trained on since the start.", _E, (WORKER,)),
    Metric("fedmoe_training_loss", GAUGE, "Training loss of the last step, in nats per token.", _E, (WORKER,)),
    Metric("fedmoe_training_tokens_per_second", GAUGE, "Speed of the last ten steps.", _E, (WORKER,)),
    Metric("fedmoe_sync_version", GAUGE, "Version of the expert that was pulled last.", _E, (WORKER,)),
    Metric("fedmoe_sync_updates_total", COUNTER, "Updates of this worker: published, applied, refused.",
           ("expert", "outcome"), (WORKER,)),
    Metric("fedmoe_sync_staleness_updates", GAUGE, "Staleness of the last decided update.", _E, (WORKER,)),
    Metric("fedmoe_sync_in_flight_seconds", GAUGE, "Age of the undecided update; 0 if there is none.", _E, (WORKER,)),
    Metric("fedmoe_sync_problem", GAUGE, "1 while the worker has a problem, else 0.", _E, (WORKER,)),
    # Of both
    Metric("fedmoe_disk_free_bytes", GAUGE, "Free space for this process where it writes: keep_updates or state_dir.",
           ("directory",), (AGGREGATOR, WORKER)),
    Metric("fedmoe_disk_size_bytes", GAUGE, "Size of that file system.", ("directory",), (AGGREGATOR, WORKER)),
)  # fmt: skip


def tables() -> str:
    """The tables of docs/monitoring.md, as Markdown."""
    parts = []
    for kind, title in TITLES.items():
        rows = [
            f"| `{one.name}` | {one.kind} | {', '.join(f'`{name}`' for name in one.labels)} | {one.help} |"
            for one in METRICS
            if kind in one.of
        ]
        head = "| metric | kind | labels | |\n| --- | --- | --- | --- |\n"
        parts.append(f"### {title}\n\n{head}" + "\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(tables(), end="")
