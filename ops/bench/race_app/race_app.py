"""FedAvg of a LoRA adapter in Flower: a client takes a round's steps with FedMoE's trainer, and keeps its optimizer.

The server saves the weights after each round, with the second since the first round began, and with the seconds that
the slowest clients' processes took to start: Flower starts one for each message.
"""

import os
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file, save_file

from ops.bench.race_seat import Seat, read_setup

client = ClientApp()
server = ServerApp()


@cache
def seat_of(directory: str, number: int) -> Seat:
    """A client's trainer, made once in a process."""
    return Seat(Path(directory), number)


def start_s() -> float:
    """Seconds since this process began."""
    return time.time() - psutil.Process().create_time()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Take a round's steps from the weights that came."""
    made = seat_of.cache_info().misses
    seat = seat_of(str(context.run_config["directory"]), int(context.node_config["partition-id"]))
    began_s = start_s() if seat_of.cache_info().misses > made else 0.0
    trainer = seat.trainer
    if "optimizer" in context.state:
        kept = context.state["optimizer"]
        assert isinstance(kept, ArrayRecord)
        state = {name: torch.from_numpy(np.array(array.numpy())) for name, array in kept.items()}
        trainer.position = int(state.pop("position"))
        trainer.load_state(state)
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    seat.flat.copy_(torch.from_numpy(np.array(arrays["flat"].numpy())))
    for _ in range(seat.setup.round_steps):
        seat.step()
    state = trainer.state() | {"position": torch.tensor(trainer.position)}
    context.state["optimizer"] = ArrayRecord({name: Array(one.numpy()) for name, one in state.items()})
    changed = ArrayRecord({"flat": Array(seat.flat.detach().numpy())})
    content = RecordDict({"arrays": changed, "metrics": MetricRecord({"num-examples": 1, "start": began_s})})
    return Message(content=content, reply_to=message)


class SavingFedAvg(FedAvg):
    """FedAvg that saves the weights after each round."""

    def __init__(self, directory: Path, clients: int) -> None:
        super().__init__(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        self.directory = directory
        self.began = self.starts = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg; the clock starts when the first round is handed out."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.began = self.began or time.monotonic()
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As FedAvg, then save; a reply that failed ends the run."""
        replies = list(replies)
        for reply in replies:
            if reply.has_error():
                raise RuntimeError(f"a client failed: {reply.error}")
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        self.starts += max(float(reply.content["metrics"]["start"]) for reply in replies)
        tensors = {
            "flat": torch.from_numpy(np.array(arrays["flat"].numpy())),
            "second": torch.tensor(time.monotonic() - self.began, dtype=torch.float64),
            "starts": torch.tensor(self.starts, dtype=torch.float64),
        }
        fresh = self.directory / "saving"
        save_file(tensors, fresh)
        os.replace(fresh, self.directory / f"round-{server_round}.safetensors")
        return arrays, metrics


@server.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds of the race."""
    directory = Path(str(context.run_config["directory"]))
    setup = read_setup(directory)
    arrays = ArrayRecord({"flat": Array(load_file(directory / "first.safetensors")["flat"].numpy())})
    SavingFedAvg(directory, len(setup.domains)).start(grid, arrays, num_rounds=setup.rounds)
