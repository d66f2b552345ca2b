"""What the tests of `fedmoe gateway follow` share: a gateway that gets new versions."""

import json
from pathlib import Path
from typing import Any

from fedmoe.protocol.names import GATEWAY
from fedmoe.store.connection import Connection
from tests.federation import ScriptedWorker, make_expert, serve, small_spec


class Gateway:
    """A trained gateway; `publish` makes its next version."""

    def __init__(self, connection: Connection) -> None:
        self.expert = make_expert(connection, GATEWAY)
        self._worker = ScriptedWorker(connection, small_spec(), "sql.alice", GATEWAY)

    def publish(self, amount: float = 0.5) -> None:
        self._worker.push(amount)
        serve(self.expert)
        self._worker.pull()


def config_in(directory: Path) -> dict[str, Any]:
    """An adapter's configuration."""
    return dict(json.loads((directory / "adapter_config.json").read_text()))
