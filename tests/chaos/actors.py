"""The processes of a chaos run: the real aggregator command, and the real worker with a trainer that only counts."""

import hashlib
import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fedmoe.cli.aggregator  # imported once, before the processes are forked
import fedmoe.cli.main
from consumers.daemon import Aggregator  # noqa: F401  # imported before the fork, for the command to find
from fedmoe.data.jsonl import DataFile
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.names import GATEWAY, name_on_gateway
from fedmoe.protocol.records import Meta
from fedmoe.protocol.rules import NESTEROV, SGD, AggregationRules, RuleSet, TrainingSettings
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Header
from fedmoe.settings import RedisSettings, WorkerSettings
from fedmoe.store.worker import WorkerStore
from fedmoe.util.stopping import Stop, stop_on_signals
from producers.checkpoint import name_in
from producers.material import Material
from producers.worker import Worker
from tests.chaos.failpoints import Arm, Failpoints
from tests.federation import FINGERPRINT

LEASE_S = 1.0
TIMEOUT_S = 2.0
STEP_S = 0.02
NORM = 0.01  # of what one step changes


def make_spec(rank: int, width: int, wire_format: str) -> Spec:
    """Two tensors of rank × width values."""
    layout = Layout.of(
        [
            ("base_model.model.layers.0.q_proj.lora_A.weight", (rank, width)),
            ("base_model.model.layers.0.q_proj.lora_B.weight", (width, rank)),
        ]
    )
    return Spec(
        base_model="chaos",
        base_config={"hidden_size": width},
        layout=layout,
        lora=LoraSettings(rank=rank, alpha=2.0 * rank),
        wire_format=wire_format,
    )


def make_rules(sync_interval_s: float, max_staleness: int, server_optimizer: str = SGD) -> RuleSet:
    """Rules that the operator of the run changes now and then."""
    aggregation = AggregationRules(
        max_norm=1e6, max_staleness=max_staleness, server_optimizer=server_optimizer
    )
    return RuleSet(aggregation=aggregation, sync_interval_s=sync_interval_s)


# Payloads of 1 KiB, and of 2.4 million values (SmolLM2-135M with rank 8) as int8 in three parts.
# The workers of `tiny` train the gateway, too, whose server optimizer has a state.
EXPERTS = {
    "tiny": make_spec(2, 64, "fp32"), "real": make_spec(16, 75_000, "int8"), GATEWAY: make_spec(2, 64, "bf16"),
}  # fmt: skip
RULES = {
    "tiny": replace(make_rules(0.3, 10), train="both"), "real": make_rules(4.0, 256),
    GATEWAY: make_rules(0.3, 10, NESTEROV),
}  # fmt: skip
WORKERS = {"t1": "tiny", "t2": "tiny", "t3": "tiny", "t4": "tiny", "r1": "real", "r2": "real"}
LEDGERS = WORKERS | {  # a worker's name on an expert -> the expert
    name_on_gateway(expert, worker): GATEWAY
    for worker, expert in WORKERS.items()
    if RULES[expert].train == "both"
}
AGGREGATORS = ("a1", "a2", "a3")


@dataclass(frozen=True)
class Place:
    """Where a run keeps its files, and where its Redis is.

    Args:
        directory: of the files.
        url: of Redis, for a run without TLS.
        enrolments: directory with an enrolment file for each process of a run over TLS.
    """

    directory: Path
    url: str
    enrolments: Path | None = None

    def redis(self, party: str) -> RedisSettings:
        """How a worker, or the aggregator, reaches Redis."""
        if self.enrolments:
            return RedisSettings(enrolment=self.enrolments / f"{party}.toml", timeout_s=TIMEOUT_S)
        return RedisSettings(url=self.url, timeout_s=TIMEOUT_S)

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def trains(self, worker: str, pid: int) -> bool:
        """True once this process of a worker trains; told to end before, it leaves its last updates undecided."""
        return "step " in self.log(worker).read_text().rpartition(f"---- pid {pid} ")[2]

    def state(self, worker: str) -> Path:
        """The state directory of a worker, or of its name on the gateway."""
        domain, dot, name = worker.partition(".")
        return self.directory / "state" / (Path(name) / GATEWAY if dot else Path(domain))

    @property
    def failpoints(self) -> Path:
        return self.directory / "failpoints"

    @property
    def published(self) -> Path:
        return self.directory / "published"

    @property
    def kept(self) -> Path:
        return self.directory / "kept"


def begin(place: Place, name: str, arm: Arm | None) -> None:
    """What every process does first."""
    log = os.open(place.log(name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    print(f"---- pid {os.getpid()} {arm or ''}")
    Failpoints(arm, place.failpoints, name).install()


def run_aggregator(place: Place, name: str, arm: Arm | None, without: str = "") -> None:
    """`fedmoe aggregator run`."""
    begin(place, name, arm)
    if without:
        from tests.chaos.without import RULES

        RULES[without]()
    experts = [word for expert in EXPERTS if expert != GATEWAY for word in ("--expert", expert)]
    reach = (
        ["--enrolment", str(place.enrolments / "aggregator.toml")]
        if place.enrolments
        else ["--redis", place.url]
    )
    sys.argv = [
        "fedmoe", "aggregator", "run", *reach, "--redis-timeout", str(TIMEOUT_S), "--lease", str(LEASE_S),
        "--block-ms", "100", "--gateway-interval", "1", "--keep-updates", str(place.kept), *experts,
    ]  # fmt: skip
    fedmoe.cli.main.main()


@dataclass(frozen=True)
class Step:
    """One step of the counting trainer."""

    loss: float = 1.0
    n_examples: int = 1
    n_tokens: int = 1
    applied: bool = True


class CountingTrainer:
    """Step n adds a vector that depends on the worker and on n; a step is an example, so that all can be counted."""

    def __init__(self, name: str, spec: Spec) -> None:
        self.flat = torch.zeros(spec.layout.numel)
        self.position = 0
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        direction = torch.randn(spec.layout.numel, generator=torch.Generator().manual_seed(seed))
        self._direction = direction / direction.norm()

    def compute(self) -> None:
        time.sleep(STEP_S)

    def apply(self, computed: None) -> Step:
        self.position += 1
        self.flat.add_(self._direction, alpha=NORM * (1 + self.position % 7))
        return Step()

    def state(self, spares: object) -> Mapping[str, torch.Tensor]:
        return {"step": torch.tensor(float(self.position))}

    def load_state(self, state: Mapping[str, torch.Tensor], *, same_data: bool) -> None:
        """Nothing to take over."""

    def adopt(self, settings: TrainingSettings) -> None:
        """It trains in one way only."""


def prepare(
    settings: WorkerSettings, spec: Spec, meta: Meta, data: DataFile, *_: object, **__: object
) -> Material:
    """All but the model."""
    identity = BaseIdentity(fingerprint=FINGERPRINT)
    n_examples = len(data.path.read_text().splitlines())
    return Material(
        identity, n_examples, data.digest, 512, lambda spec, *_: CountingTrainer(settings.worker, spec)
    )


def run_worker(place: Place, name: str, arm: Arm | None, without: str = "") -> None:
    """`fedmoe worker run --state-dir`, with the counting trainer, and a journal of what it publishes."""
    begin(place, name, arm)
    if without:
        from tests.chaos.without import RULES

        RULES[without]()
    publish = WorkerStore.publish  # put around it from outside: the product keeps no journal

    def noted(store: WorkerStore, header: Header, parts: Any) -> str:
        content = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
        with place.published.open("a") as out:
            out.write(f"{store.worker} {header.run} {header.seq} {header.n_examples} {content}\n")
        return publish(store, header, parts)

    WorkerStore.publish = noted
    began_before = bool(name_in(place.state(name)))
    if (
        began_before
    ):  # the state directory in another container: the worker goes on under the name that is in it
        socket.gethostname = lambda: f"host-{os.getpid()}"
    settings = WorkerSettings(
        stream=WORKERS[name], data=place.directory / "rows.jsonl", name="" if began_before else name,
        state_dir=place.state(name), drain_s=60.0,
    )  # fmt: skip
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    with stop_on_signals(stop := Stop()):
        Worker(place.redis(name), settings, stop=stop, prepare=prepare).run()
