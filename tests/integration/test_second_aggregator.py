"""An aggregator to which no expert is named, in a federation whose experts have names of their own."""

from pathlib import Path

import pytest

from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from tests.processes import fedmoe_here
from tests.tiny_federation import make_federation

pytestmark = pytest.mark.one_server


def test_it_serves_what_there_is_and_creates_no_default_experts(
    connection: Connection, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also on a machine without the base model; what was typed is compared with the experts all the same."""
    make_federation(connection, tiny_model_dir)
    command = ("aggregator", "run", "--redis", connection.settings.url, "--burst")
    done = fedmoe_here(*command)
    assert (done.returncode, done.stderr.count("Qwen")) == (0, 0), done.stderr
    assert GatewayStore(connection).listed() == {"red", "blue"}
    typed = fedmoe_here(*command, "--rank", "8")
    assert typed.returncode != 0
    assert "exists with rank 4, not 8" in typed.stderr
    assert fedmoe_here(*command, "--lr", "0.5").returncode == 0
    assert "fedmoe expert set red --lr 0.5" in caplog.text
    assert GatewayStore(connection).listed() == {"red", "blue"}
