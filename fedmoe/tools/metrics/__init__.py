"""Metrics for Prometheus: what each process counts, and what Redis tells of a federation."""
