"""What each wire format costs in held-out loss: the same training, the same data, only the format differs.

Two workers of one expert train SmolLM2-135M on the demo's rows, each on half of a domain. They push and pull after
every other step, far more often than every ten seconds, so that whatever a format rounds away is rounded away often.
Everything runs in turns in one process, so nothing but the format makes a difference: the real books, a real Redis,
the real fold. Loss is that of the expert's exact weights, the aggregator's, on rows that nobody trained on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from consumers.expert import Expert
from fedmoe.data.bad_rows import BadRows
from fedmoe.data.encode import Example
from fedmoe.data.examples import make_examples, padding_id
from fedmoe.data.jsonl import open_data
from fedmoe.demo.datasets import find_data
from fedmoe.demo.pretrained import ensure_demo_model
from fedmoe.model.adapter import adapter_layout, attach_adapter
from fedmoe.model.base import load_base, load_config
from fedmoe.model.tokenizer import load_tokenizer
from fedmoe.protocol.formats import FORMATS
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.protocol.spec import Spec
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.tools.evaluate import mean_loss
from fedmoe.util.disk import cache_directory
from ops.bench.fedmoe_side import DEFAULT_FORMAT, RULES, Client, create_expert, make_spec
from ops.bench.plan import Plan, Quality
from ops.bench.processes import BenchError, Processes
from ops.bench.result import Result, figure, ratio
from producers.trainer import Trainer

CPU = torch.device("cpu")
LORA = LoraSettings(rank=8, alpha=16.0)
TRAINING = TrainingSettings(learning_rate=1e-3, batch_size=2, max_length=192, warmup_steps=4)
N_WORKERS = 2


class Learner(Client):
    """A client that trains: `local` is the model's adapter itself."""

    def __init__(self, url: str, expert: str, name: str, trainer: Trainer) -> None:
        super().__init__(url, expert, name)
        self._trainer = trainer
        trainer.flat.copy_(self.local)
        self.local = trainer.flat

    def train(self) -> None:
        """One step."""
        with torch.enable_grad():
            self._trainer.step()


@torch.no_grad()
def run(plan: Plan) -> Iterator[Result]:
    """Held-out loss in every format, of every domain; relative to fp32 as the mean over the domains' ratios."""
    torch.set_num_threads(2)
    model_dir = str(ensure_demo_model(cache_directory(), report=print))
    data = find_data(None, cache_directory() / "bench-data")
    spec = make_spec(adapter_layout(load_config(model_dir), LORA), "fp32", lora=LORA)
    models = []
    for _ in range(N_WORKERS):
        model = load_base(model_dir, device=CPU, dtype=torch.float32)
        tokenizer = load_tokenizer(model_dir)
        models.append(attach_adapter(model, spec))
    losses: dict[str, list[float]] = {form: [] for form in FORMATS}
    untrained: list[float] = []
    pad_id = padding_id(tokenizer)
    bad_rows = BadRows(report=print)
    for domain in plan.quality.domains:
        rows, test = (
            make_examples(open_data(file, bad_rows), tokenizer, TRAINING.max_length, bad_rows).examples
            for file in (data.train[domain], data.test[domain])
        )
        test = test[: plan.quality.rows]

        def loss_of(weights: torch.Tensor, test: Sequence[Example] = test) -> float:
            adapted, flat = models[0]
            flat.copy_(weights)
            return mean_loss(adapted, test, pad_id=pad_id, batch_size=8, device=CPU)

        for form in FORMATS:
            before, after = _train(plan.quality, models, rows, replace(spec, wire_format=form), pad_id)
            if form == "fp32":
                untrained.append(loss_of(before))
            losses[form].append(loss_of(after))
            print(f"    {domain} {form}: {untrained[-1]:.4f} -> {losses[form][-1]:.4f}", flush=True)
    yield figure("quality_untrained_loss", untrained, "nats/token")
    for form in FORMATS:
        yield figure(f"quality_{form}_loss", losses[form], "nats/token")
        yield ratio(f"quality_{form}_vs_fp32", losses[form], losses["fp32"])
    yield ratio("quality_default_vs_fp32", losses[DEFAULT_FORMAT], losses["fp32"])


def _train(
    quality: Quality,
    models: Sequence[tuple[Any, torch.Tensor]],
    rows: Sequence[Example],
    spec: Spec,
    pad_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The expert's weights (numel,) fp32 before and after a training in this format."""
    with Processes(f"quality_{spec.wire_format}") as processes:
        url = processes.redis()
        create_expert(url, "expert", spec, rules=replace(RULES, training=TRAINING))
        expert = Expert(ExpertStore(Connection(RedisSettings(url=url)), "expert"), spec, aggregator="bench")
        expert.load()
        before = expert.buffer.flat.clone()
        learners = []
        for number, (model, local) in enumerate(models):
            trainer = Trainer(
                model=model, flat=local, examples=rows[number::N_WORKERS], pad_id=pad_id, settings=TRAINING,
                seed=number, device=CPU,
            )  # fmt: skip
            learners.append(Learner(url, "expert", f"worker{number}", trainer))
        for _ in range(quality.syncs):
            for learner in learners:
                for _ in range(quality.steps):
                    learner.train()
                learner.publish(learner.make_update())
            expert.process(expert.store.read(block_ms=100, count=N_WORKERS))
            if sum(learner.pull() for learner in learners) != N_WORKERS:
                raise BenchError(f"not every update in format {spec.wire_format} was applied")
        return before, expert.buffer.flat.clone()
