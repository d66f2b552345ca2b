"""Tokens a second of a worker that trains its expert and the gateway by turns, and of one that trains its expert alone.

The real trainers, memberships and syncs with checkpoints, on the small random Qwen2 of the overlap benchmark. Two
workers take turns of one window each, and only the one whose window it is trains: in each round the one that trains
both, and half as long before and after it the other one, so that a machine that slowly becomes faster or slower favours
neither. A window holds several publications of each expert.
"""

import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedmoe.data.encode import Answer, Example
from fedmoe.model.adapter import attach_adapter, switch_to
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.names import GATEWAY, name_on_gateway
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.settings import RedisSettings
from ops.bench.fedmoe_side import FINGERPRINT, RULES, aggregator_command, create_expert
from ops.bench.overlap import ROW_TOKENS, Window, model_config, overlap_spec
from ops.bench.plan import Plan
from ops.bench.processes import CONTEXT, BenchError, Processes
from ops.bench.result import Result, figure, ratio
from producers.checkpoint import StateDir
from producers.membership import Membership, finish, outcomes, pass_boundaries
from producers.trainer import Trainer

EXPERT = "turns"
DRAIN_S = 20.0


def train(pipe: Any, url: str, experts: Sequence[str], name: str, hidden: int, state: Path) -> None:
    """Body of a worker's process: receives seconds, answers with a Window; leaves the federation at 0 seconds."""
    torch.manual_seed(0)
    config = model_config(hidden)
    model: PreTrainedModel | PeftModel = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    row = Example(array("i", range(1, ROW_TOKENS + 1)), (Answer(1, ROW_TOKENS, 1.0),))
    members, trainers = {}, []
    for expert in experts:
        worker = name_on_gateway(EXPERT, name) if expert == GATEWAY else name
        member = Membership(RedisSettings(url=url), expert, worker, state_dir=StateDir(state / expert))
        spec, meta = member.look()
        member.claim(BaseIdentity(fingerprint=FINGERPRINT))
        adapted, flat = attach_adapter(model, spec, expert)
        model = adapted
        trainer = Trainer(
            model=adapted, flat=flat, examples=[row] * 8, pad_id=0, settings=meta.rules.training, seed=0,
            device=torch.device("cpu"), activate=switch_to(adapted, expert),
        )  # fmt: skip
        member.begin(trainer, data="bench")
        members[expert] = member
        trainers.append(trainer)
    for trainer in trainers * 2:
        trainer.step()
    for member in members.values():
        member.thread.start()
    pipe.send(None)
    while seconds := pipe.recv():
        published = sum(member.sync.status.published for member in members.values())
        tokens, waiting_s, steps, began = 0, 0.0, 0, time.monotonic()
        while (now := time.monotonic()) - began < seconds:
            pass_boundaries(members.values())
            waiting_s += time.monotonic() - now
            number = steps % len(trainers)
            step = trainers[number].step()
            members[experts[number]].exchange.record(step)
            tokens, steps = tokens + step.n_tokens, steps + 1
        took = time.monotonic() - began
        published = sum(member.sync.status.published for member in members.values()) - published
        pipe.send(Window(tokens, took, waiting_s, published))
    finish(list(members.values()), DRAIN_S)
    pipe.send(outcomes(members, DRAIN_S))
    pipe.recv()  # until it is killed


class Worker:
    """A worker's process."""

    def __init__(
        self, processes: Processes, url: str, experts: Sequence[str], name: str, hidden: int
    ) -> None:
        self._processes = processes
        self._pipe, theirs = CONTEXT.Pipe()
        processes.call(name, train, theirs, url, list(experts), name, hidden, processes.directory / name)

    def answer(self) -> Any:
        """What the worker sends next."""
        self._processes.until("the training", self._pipe.poll, timeout_s=300.0)
        return self._pipe.recv()

    def window(self, seconds: float) -> Window:
        """Train for so long."""
        self._pipe.send(seconds)
        window: Window = self.answer()
        if not window.published:
            raise BenchError(f"a worker published nothing in {seconds:g} s")
        return window

    def end(self) -> None:
        """Publish the rest and leave; what is lost is an error."""
        self._pipe.send(0.0)
        self.answer()


def run(plan: Plan) -> Iterator[Result]:
    """The ratio of a round's two rates."""
    turns, spec = plan.turns, overlap_spec(plan.overlap_hidden)
    training = TrainingSettings(batch_size=1, learning_rate=1e-5)
    rules = replace(RULES, training=training, sync_interval_s=turns.interval_s)
    with ExitStack() as stack:
        processes = stack.enter_context(Processes("turns"))
        url = processes.redis()
        for name in (EXPERT, GATEWAY):
            create_expert(url, name, spec, rules=rules)
        processes.command("aggregator", *aggregator_command(url, [EXPERT]))
        one = Worker(processes, url, (EXPERT,), "one", plan.overlap_hidden)
        both = Worker(processes, url, (EXPERT, GATEWAY), "both", plan.overlap_hidden)
        for worker in (one, both):
            worker.answer()
        rounds = []
        for _ in range(turns.rounds):
            before = one.window(turns.window_s / 2)
            middle = both.window(turns.window_s)
            after = one.window(turns.window_s / 2)
            rate = (before.tokens + after.tokens) / (before.seconds + after.seconds)
            rounds.append((middle, middle.tokens / middle.seconds, rate))
        for worker in (one, both):
            worker.end()
    windows, of_both, of_one = (list(column) for column in zip(*rounds, strict=True))
    yield figure("turns_tokens_per_s_one", of_one, "tokens/s")
    yield figure("turns_tokens_per_s_both", of_both, "tokens/s")
    yield figure("turns_boundary_ms", [w.waiting_s * 1000 / w.published for w in windows], "ms/update")
    yield ratio("turns_both_vs_one", of_both, of_one)
