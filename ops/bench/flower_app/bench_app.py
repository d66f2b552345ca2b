"""FedAvg of an adapter's arrays in Flower: a client adds a small number instead of training.

Between two rounds the server waits for a file named `go` and removes it, so that the benchmark can let contestants take
turns; it notes when each round began and ended in a file named `rounds`. `layout.json` names the arrays and shapes.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Send back what came, a little changed."""
    arrays = message.content["arrays"]
    changed = ArrayRecord({name: Array(array.numpy() + np.float32(1e-4)) for name, array in arrays.items()})
    content = RecordDict({"arrays": changed, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)


class TimedFedAvg(FedAvg):
    """FedAvg that begins a round when it may, and notes its times."""

    def __init__(self, directory: Path, clients: int) -> None:
        super().__init__(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        self.directory = directory
        self.began = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Wait for the go, then as FedAvg."""
        go = self.directory / "go"
        while not go.exists():
            time.sleep(0.01)
        go.unlink()
        self.began = time.monotonic()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As FedAvg, then note the times."""
        replies = list(replies)
        failed = sum(reply.has_error() for reply in replies)
        result = super().aggregate_train(server_round, replies)
        with (self.directory / "rounds").open("a") as out:
            out.write(f"{len(replies) - failed} {self.began} {time.monotonic()}\n")
        return result


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Rounds without end; the benchmark ends the processes."""
    directory = Path(str(context.run_config["directory"]))
    shapes = json.loads((directory / "layout.json").read_text())
    arrays = ArrayRecord({name: Array(np.zeros(shape, np.float32)) for name, shape in shapes})
    TimedFedAvg(directory, int(context.run_config["clients"])).start(grid, arrays, num_rounds=1_000_000)
