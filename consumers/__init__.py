"""The aggregator side: makes updates part of experts, and experts part of the gateway."""
