"""FedMoE's side of the race: a Redis, an aggregator, and workers that train the gateway."""

import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.names import GATEWAY, name_on_gateway
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from ops.bench.fedmoe_side import FINGERPRINT, aggregator_command, create_expert
from ops.bench.plan import NEW_GATEWAY
from ops.bench.processes import CONTEXT, Processes
from ops.bench.race_seat import TRAINING, Seat, Setup, Snapshot
from producers.checkpoint import StateDir
from producers.membership import Membership, pass_boundaries

READY_S = 120.0


def train(pipe: Any, url: str, directory: Path, number: int) -> None:
    """Body of a worker's process: says when it is ready, begins when told to, and trains until it is killed."""
    seat = Seat(directory, number)
    domain = seat.setup.domains[number]
    state = StateDir(directory / f"state-{number}")
    member = Membership(
        RedisSettings(url=url), GATEWAY, name_on_gateway(domain, f"w{number}"), state_dir=state
    )
    member.look()
    member.claim(BaseIdentity(fingerprint=FINGERPRINT))
    member.begin(seat.trainer, data="race")
    pipe.send(None)
    pipe.recv()
    member.thread.start()
    while True:
        pass_boundaries([member])
        member.exchange.record(seat.step())


def run_fedmoe(directory: Path, setup: Setup) -> Generator[Snapshot]:
    """The weights once in `sync_s`, until an ordinary client has taken its steps."""
    spec = setup.spec()
    rules = replace(NEW_GATEWAY, training=TRAINING, sync_interval_s=setup.sync_s)
    n_moments = round(setup.steps * min(setup.step_s) / setup.sync_s)
    with Processes("race") as processes:
        url = processes.redis()
        experts = list(dict.fromkeys(setup.domains))
        for name in (*experts, GATEWAY):
            create_expert(url, name, spec, rules=rules)
        processes.command("aggregator", *aggregator_command(url, experts))
        pipes = []
        for number in range(len(setup.domains)):
            pipe, theirs = CONTEXT.Pipe()
            processes.call("workers", train, theirs, url, directory, number)
            pipes.append(pipe)
        for pipe in pipes:
            processes.until("a worker to load the model", pipe.poll, timeout_s=READY_S)
            pipe.recv()
        connection = Connection(RedisSettings(url=url))
        store = GatewayStore(connection)
        seen = [Snapshot(0.0, _weights(store, setup))]
        began = time.monotonic()
        for pipe in pipes:
            pipe.send(None)
        for moment in range(1, n_moments + 1):
            processes.sleep(began + moment * setup.sync_s - time.monotonic())
            seen.append(Snapshot(time.monotonic() - began, _weights(store, setup)))
        connection.close()
    yield from seen


def _weights(store: GatewayStore, setup: Setup) -> torch.Tensor:
    layout = setup.spec().layout
    flat, tensors = torch.empty(layout.numel), load(store.read(GATEWAY)[1])
    for name, view in layout.views(flat).items():
        view.copy_(tensors[name])
    return flat
