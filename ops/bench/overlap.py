"""Tokens a second of a worker that trains, with its sync on and off.

The real trainer and the real sync thread with its checkpoints, on a small random Qwen2 with an adapter of about 9 MiB.
In each round the worker trains for a while with the sync, and half as long without it before and after, so that a
machine that slowly becomes faster or slower favours neither. The sync's clock is set forward by half an interval, so
that a window of one interval holds one whole sync. The model computes with one thread; aggregator and Redis share the
machine with it, as they would not in earnest.
"""

import secrets
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from fedmoe.data.encode import Answer, Example
from fedmoe.model.adapter import adapter_layout, attach_adapter
from fedmoe.model.base import structure
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import make_run
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.worker import WorkerStore
from ops.bench.fedmoe_side import (
    DEFAULT_FORMAT,
    FINGERPRINT,
    RULES,
    aggregator_command,
    create_expert,
    make_spec,
)
from ops.bench.plan import Plan
from ops.bench.processes import CONTEXT, BenchError, Processes
from ops.bench.result import Result, at_least, figure, ratio
from producers.checkpoint import StateDir
from producers.exchange import Exchange
from producers.ledger import Ledger
from producers.membership import wire
from producers.pull import pull
from producers.trainer import Trainer

VOCAB = 512
ROW_TOKENS = 24
DRAIN_S = 20.0
ENOUGH = 15  # rounds, for an interval


@dataclass(frozen=True, slots=True)
class Window:
    """What was trained in one window; waiting_s is what the training thread spent at step boundaries."""

    tokens: int
    seconds: float
    waiting_s: float
    published: int


def model_config(hidden: int) -> Qwen2Config:
    """A Qwen2 of 6 layers."""
    return Qwen2Config(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=hidden * 5 // 2, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip


def overlap_spec(hidden: int) -> Spec:
    """Rank 48: at a hidden size of 512 about 9 MiB."""
    config = model_config(hidden)
    lora = LoraSettings(rank=48, alpha=96.0)
    return make_spec(
        adapter_layout(config, lora),
        DEFAULT_FORMAT,
        base_config=structure(config),
        lora=lora,
    )


def train(pipe: Any, url: str, expert: str, hidden: int, state_dir: Path) -> None:
    """Body of the worker's process: receives (with sync?, seconds), answers with a Window, for ever."""
    state = StateDir(state_dir)
    store = WorkerStore(Connection(RedisSettings(url=url)), expert, "worker")
    spec = store.spec()
    pulled = pull(store, spec, known="")
    base = pulled.weights
    assert base is not None
    ledger = Ledger(base=base, meta=pulled.meta, run=make_run(store.next_incarnation(), secrets.token_hex(4)))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(hidden)).eval().requires_grad_(False)
    adapted, flat = attach_adapter(model, spec)
    row = Example(array("i", range(1, ROW_TOKENS + 1)), (Answer(1, ROW_TOKENS, 1.0),))
    trainer = Trainer(
        model=adapted, flat=flat, examples=[row] * 8, pad_id=0, settings=pulled.meta.rules.training, seed=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    exchange = Exchange(trainer, with_optimizer=True, spares=ledger.spares)
    for _ in range(3):
        trainer.step()
    pipe.send(None)
    while True:
        with_sync, seconds = pipe.recv()
        if not with_sync:
            pipe.send(_train_for(trainer, exchange, seconds))
            continue
        ahead_s = 0.0
        sync = wire(
            store, ledger, exchange, spec, identity=BaseIdentity(fingerprint=FINGERPRINT), state_dir=state,
            data="bench", clock=lambda: time.monotonic() + ahead_s,  # noqa: B023  # the change below is meant
        )  # fmt: skip
        ahead_s = ledger.meta.rules.sync_interval_s / 2
        thread = threading.Thread(target=sync.run, daemon=True)
        thread.start()
        window = _train_for(trainer, exchange, seconds)
        window = replace(window, published=sync.status.published)
        sync.finish(DRAIN_S)
        while thread.is_alive():
            exchange.boundary()
            thread.join(0.02)
        if sync.failure or sync.status.refused or ledger.queue:
            raise BenchError(f"the sync failed: {sync.failure or sync.status}")
        pipe.send(window)


def _train_for(trainer: Trainer, exchange: Exchange, seconds: float) -> Window:
    tokens, waiting_s, began = 0, 0.0, time.monotonic()
    while (now := time.monotonic()) - began < seconds:
        exchange.boundary()
        waiting_s += time.monotonic() - now
        step = trainer.step()
        exchange.record(step)
        tokens += step.n_tokens
    return Window(tokens, time.monotonic() - began, waiting_s, 0)


class Worker:
    """A worker's process, with an expert of its own."""

    def __init__(self, processes: Processes, url: str, expert: str, hidden: int) -> None:
        self._processes = processes
        self._pipe, theirs = CONTEXT.Pipe()
        state_dir = processes.directory / expert
        processes.call("worker", train, theirs, url, expert, hidden, state_dir)

    def answer(self) -> Any:
        """What the worker sends next."""
        self._processes.until("the training", self._pipe.poll, timeout_s=300.0)
        return self._pipe.recv()

    def window(self, seconds: float, *, with_sync: bool) -> Window:
        """Train for so long."""
        self._pipe.send((with_sync, seconds))
        window: Window = self.answer()
        if with_sync and not window.published:
            raise BenchError(f"the worker published nothing in {seconds:g} s with its sync on")
        return window


def run(plan: Plan) -> Iterator[Result]:
    """Each interval: the ratio of a round's two rates."""
    hidden = plan.overlap_hidden
    spec = overlap_spec(hidden)
    training = TrainingSettings(batch_size=1, learning_rate=1e-5)
    rules = {
        f"every{n}": replace(RULES, training=training, sync_interval_s=o.interval_s)
        for n, o in enumerate(plan.overlap)
    }
    with ExitStack() as stack:
        processes = stack.enter_context(Processes("overlap"))
        url = processes.redis()
        for name, those in rules.items():
            create_expert(url, name, spec, rules=those)
        processes.command("aggregator", *aggregator_command(url, list(rules)))
        workers = [Worker(processes, url, name, hidden) for name in rules]
        for worker in workers:
            worker.answer()
        yield figure("overlap_adapter_mib", [spec.layout.file_bytes / 2**20], "MiB")
        for worker, overlap in zip(workers, plan.overlap, strict=True):
            rounds = [_round(worker, overlap.window_s) for _ in range(overlap.rounds)]
            yield from _describe(f"overlap_{overlap.interval_s:g}s", rounds)


def _round(worker: Worker, seconds: float) -> tuple[Window, Window]:
    """The window with sync, and the two without around it as one."""
    before = worker.window(seconds / 2, with_sync=False)
    on = worker.window(seconds, with_sync=True)
    after = worker.window(seconds / 2, with_sync=False)
    return on, Window(before.tokens + after.tokens, before.seconds + after.seconds, 0.0, 0)


def _describe(name: str, rounds: Sequence[tuple[Window, Window]]) -> Iterator[Result]:
    on, off = (
        [window.tokens / window.seconds for window in windows] for windows in zip(*rounds, strict=True)
    )
    yield figure(f"{name}_tokens_per_s_on", on, "tokens/s")
    yield figure(f"{name}_tokens_per_s_off", off, "tokens/s")
    waited = [window.waiting_s * 1000 / window.published for window, _ in rounds]
    yield figure(f"{name}_boundary_ms", waited, "ms/update")
    yield ratio(name, on, off)
    if len(rounds) >= ENOUGH:
        yield at_least(f"{name}_at_least", [a / b for a, b in zip(on, off, strict=True)])
