"""Metrics for Prometheus: the counters of each process, and the state of the federation in Redis."""
