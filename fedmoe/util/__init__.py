"""General helpers that know nothing of the protocol: atomic file writes, bounded stopping, declared settings."""
