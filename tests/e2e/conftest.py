"""End-to-end tests start real processes, which is slow: one server is enough, whichever there is."""

from collections.abc import Iterator

import pytest

from fedmoe.store.embedded import EmbeddedRedis


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedRedis]:
    """A running server, shared by the session."""
    with EmbeddedRedis(options=["--appendonly", "no"]) as running:
        yield running
