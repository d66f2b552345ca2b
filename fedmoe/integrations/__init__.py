"""Training libraries that become workers."""
