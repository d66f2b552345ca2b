"""The centralised adapter: trained on the rows of all experts, chosen on rows that it was not trained on."""

from array import array
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fedmoe.data.encode import Answer, Example
from fedmoe.errors import SettingsError
from fedmoe.model.adapter import adapter_layout, attach_adapter
from fedmoe.model.base import structure
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.records import Meta
from fedmoe.protocol.rules import RuleSet, TrainingSettings
from fedmoe.protocol.spec import Spec
from fedmoe.tools.base import Base
from fedmoe.tools.centralised import CENTRALISED, Job, centralise, n_steps, split
from fedmoe.tools.evaluate import MEAN, Adapter, evaluate, mean_loss
from producers.centralised import train
from producers.trainer import Trainer
from tests.errors import raises
from tests.federation import first_meta
from tests.strategies import randn
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
TRAINING = TrainingSettings(learning_rate=8e-3, batch_size=3, accumulate=2, warmup_steps=0)


def examples(n_rows: int, *, first: int = 1, per_row: int = 1) -> list[Example]:
    """Rows of six tokens, three of them an answer; the row of line k begins with token k."""
    return [
        Example(array("i", [line, 5, 6, line + 1, line + 2, 7]), (Answer(3, 6, 1.0),), line)
        for line in range(first, first + n_rows)
        for _ in range(per_row)
    ]


def make_base() -> Base:
    return Base(
        name="tiny",
        model=tiny_model(),
        config=tiny_config(),
        tokenizer=tiny_tokenizer(),
        fingerprint="",
        device=CPU,
        autocast=torch.float32,
    )


def make_spec() -> Spec:
    config, lora = tiny_config(), LoraSettings(rank=2)
    return Spec(
        base_model="tiny", base_config=structure(config), layout=adapter_layout(config, lora), lora=lora
    )


def make_meta(spec: Spec, n_examples: int, training: TrainingSettings = TRAINING) -> Meta:
    return first_meta(spec, n_examples=n_examples, rules=RuleSet(training=training))


@pytest.mark.parametrize(("n_rows", "n_held"), [(9, 8), (100, 8), (400, 8), (450, 9), (1000, 20)])
def test_validation_rows_are_spread_evenly(n_rows: int, n_held: int) -> None:
    """Two in a hundred, at least eight; every row is on one side."""
    rows = examples(n_rows)
    training, validation = split("red", rows)
    held = [example.line for example in validation]
    assert len(held) == n_held
    assert {b - a for a, b in pairwise(held)} <= {n_rows // n_held, n_rows // n_held + 1}
    assert sorted([*held, *(example.line for example in training)]) == [example.line for example in rows]


def test_examples_of_a_row_stay_together() -> None:
    """Else a conversation would be learnt and validated; of an array in one line, no row is known."""
    training, validation = split("red", examples(40, per_row=3))
    assert {example.line for example in training}.isdisjoint(example.line for example in validation)
    assert (len(training), len(validation)) == (96, 24)
    training, validation = split("red", [replace(example, line=1) for example in examples(40)])
    assert (len(training), len(validation)) == (32, 8)


def test_rows_that_are_all_held_out_are_refused() -> None:
    """Eight rows are; the sentence names the number that is needed."""
    with raises(SettingsError, about="train") as caught:
        split("red", examples(8))
    assert "at least 9" in str(caught.value)


def test_steps_are_those_of_the_experts_updates() -> None:
    """Rows by the rows of one step, rounded up; without an update there is nothing to go by."""
    assert [n_steps(n, TRAINING) for n in (1, 6, 7, 60)] == [1, 1, 2, 10]
    with raises(SettingsError, about="steps"):
        n_steps(0, TRAINING)


def test_learning_rate_with_the_lowest_validation_loss_is_taken() -> None:
    """Each one's loss is that of its own adapter on the rows held out; the mean is over the domains."""
    spec, base = make_spec(), make_base()
    direction = randn(3, spec.layout.numel)
    jobs: list[Job] = []

    def made(job: Job) -> memoryview:
        buffer = AdapterBuffer(spec.layout)
        buffer.flat.copy_(initial_weights(spec.layout, 0)).add_(direction, alpha=job.training.learning_rate)
        return buffer.file

    def stub(job: Job, report: object) -> memoryview:
        jobs.append(job)
        return made(job)

    rows = {"red": examples(20), "blue": examples(50, first=60)}
    metas = {"red": make_meta(spec, 31), "blue": make_meta(spec, 30), "green": make_meta(spec, 999)}
    said: list[str] = []
    adapter, how = centralise(
        base, dict.fromkeys(metas, spec), metas, rows, stub, steps=None, learning_rates=(), batch_size=4,
        report=said.append,
    )  # fmt: skip
    assert [job.training for job in jobs] == [
        replace(TRAINING, learning_rate=rate) for rate in (8e-3, 4e-3, 2e-3)
    ]
    assert {job.steps for job in jobs} == {how.steps} == {11}
    assert how.rows == {"red": 12, "blue": 42}
    assert [len(job.examples) for job in jobs] == [54] * 3
    held = {name: split(name, part)[1] for name, part in rows.items()}
    for job in jobs:
        one = {CENTRALISED: Adapter(file=made(job), config=spec.adapter_config())}
        loss = evaluate(base.model, one, held, pad_id=base.pad_id, batch_size=4, device=CPU)[CENTRALISED][
            MEAN
        ]
        assert how.validation[f"{job.training.learning_rate:g}"] == pytest.approx(loss)
    lowest = min(how.validation, key=lambda rate: how.validation[rate])
    assert how.validation[lowest] < max(how.validation.values())
    assert f"{how.learning_rate:g}" == lowest
    job = next(job for job in jobs if job.training.learning_rate == how.learning_rate)
    assert bytes(adapter.file) == bytes(made(job))
    assert said[-1].startswith(f"centralised has learning rate {lowest}")


def test_rules_that_differ_are_named_and_steps_and_rates_can_be_given() -> None:
    """The first expert's rules are taken; a loss that is no number never wins."""
    spec = make_spec()
    base = make_base()
    metas = {"red": make_meta(spec, 6), "blue": make_meta(spec, 6, TrainingSettings())}
    rows = {"red": examples(20), "blue": examples(20)}
    said: list[str] = []

    def stub(job: Job, report: object) -> memoryview:
        buffer = AdapterBuffer(spec.layout)
        buffer.flat.fill_(float("nan") if job.training.learning_rate > 0.5 else 0.0)
        return buffer.file

    _, how = centralise(
        base, dict.fromkeys(metas, spec), metas, rows, stub, steps=7, learning_rates=(1.0, 0.1, 0.9), batch_size=4,
        report=said.append,
    )  # fmt: skip
    assert (how.steps, how.learning_rate, list(how.validation)) == (7, 0.1, ["1", "0.1", "0.9"])
    assert "trained with those of red" in said[0]


def test_adapter_is_that_of_a_workers_trainer() -> None:
    """The same steps on the same rows give the same weights, and the base model is bare again afterwards."""
    spec, base, rows = make_spec(), make_base(), examples(20)
    before = mean_loss(base.model, rows, pad_id=base.pad_id, batch_size=4, device=CPU)
    said: list[str] = []
    file = train(Job(base=base, spec=spec, training=TRAINING, examples=rows, steps=5), said.append)
    model, flat = attach_adapter(tiny_model(), spec)
    trainer = Trainer(
        model=model, flat=flat, examples=rows, pad_id=base.pad_id, settings=TRAINING, seed=spec.init_seed, device=CPU
    )  # fmt: skip
    for _ in range(5):
        trainer.step()
    buffer = AdapterBuffer(spec.layout)
    buffer.load(bytes(file))
    assert torch.equal(buffer.flat, flat)
    assert mean_loss(base.model, rows, pad_id=base.pad_id, batch_size=4, device=CPU) == before
    adapted = {CENTRALISED: Adapter(file=file, config=spec.adapter_config())}
    after = evaluate(base.model, adapted, {"red": rows}, pad_id=base.pad_id, batch_size=4, device=CPU)
    assert after[CENTRALISED]["red"] < before
