"""Integrations that make training libraries workers."""
