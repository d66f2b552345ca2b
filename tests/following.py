"""What the tests of `fedmoe gateway follow` share: a gateway that gets new versions, and followers."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe.protocol.names import GATEWAY
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.follow.directory import VersionDirectory
from fedmoe.tools.follow.follower import Follower, FollowSettings
from fedmoe.tools.follow.servers import AdapterServer
from tests.adapter_server import StandIn
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


@dataclass
class Following:
    """A follower in this process, and the directory."""

    follower: Follower
    directory: VersionDirectory

    def look(self) -> bool:
        return self.follower.run(threading.Event(), once=True)

    @property
    def versions(self) -> list[str]:
        return sorted(path.name for path in self.directory.root.iterdir() if path.name.startswith(GATEWAY))


Follow = Callable[..., Following]


@contextmanager
def followers(connection: Connection, tmp_path: Path) -> Iterator[Follow]:
    """Make followers of a federation, one at a time."""
    opened: list[VersionDirectory] = []

    def make(
        server: StandIn | None = None, *, out: Path = tmp_path / "out", judge: Any = None, **settings: Any
    ) -> Following:
        for directory in opened:  # a process of before
            directory.close()
        opened.clear()
        opened.append(VersionDirectory(out, GATEWAY))
        follower = Follower(
            GatewayStore(connection), opened[0], FollowSettings(**settings), judge=judge,
            server=AdapterServer(server.kind, server.url + "/v1", api_key=server.key) if server else None,
        )  # fmt: skip
        return Following(follower, opened[0])

    yield make
    for directory in opened:
        directory.close()
