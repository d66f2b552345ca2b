"""The aggregator side: applies updates to experts, and merges experts into the gateway."""
