"""An expert whose aggregator keeps updates, and the weights of each version that it has had."""

from pathlib import Path

from consumers.verify import Replay, replay
from fedmoe.protocol.layout import stamped
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.spec import Spec
from fedmoe.store.archive import Archive
from fedmoe.store.backup import BackupStore
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.backup import back_up
from tests.federation import ScriptedWorker, make_expert, serve

NAME = "sql_expert"


class KeptExpert:
    """An expert, a worker, and the weights of each version."""

    def __init__(self, connection: Connection, kept: Path, spec: Spec, name: str = NAME) -> None:
        self.connection, self.kept, self.spec, self.name = connection, kept, spec, name
        self.archive = Archive(kept / name)
        weights = initial_weights(spec.layout, spec.init_seed)
        self.expert = make_expert(connection, name, spec=spec, weights=weights, archive=self.archive)
        self.worker = ScriptedWorker(connection, spec, expert=name)
        self.versions = {0: self.weights()}

    def weights(self) -> bytes:
        """As Redis has them, without their stamp."""
        return stamped(GatewayStore(self.connection).read(self.name)[1], "")

    def train(self, updates: int) -> None:
        """Each is one version."""
        self.expert.load()
        for number in range(updates):
            self.worker.push(0.25 * (number + 1))
            assert serve(self.expert) == ["applied"]
            self.worker.pull()
            self.versions[self.expert.meta.version] = self.weights()

    def replay(self) -> Replay:
        """The replay of the whole log, which is the expert byte for byte."""
        meta, weights, lines = GatewayStore(self.connection).history(self.name)
        done = replay(self.spec, meta, lines, self.archive)
        assert done.problem == ""
        assert done.weights.same_values(weights)
        return done

    def backup(self, directory: Path) -> Path:
        back_up(BackupStore(self.connection), directory)
        return directory
