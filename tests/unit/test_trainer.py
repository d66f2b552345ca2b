"""producers.trainer: a step is what it should be, and a trainer can be stopped and moved between two."""

import logging
from array import array
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel

from fedmoe.data.encode import Answer, Example
from fedmoe.data.examples import Batch
from fedmoe.errors import TooLittleMemoryError
from fedmoe.model.adapter import adapter_layout, attach_adapter
from fedmoe.model.base import structure
from fedmoe.model.loss import completion_loss
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.protocol.spec import Spec
from producers.trainer import Trainer, is_out_of_memory
from tests.errors import raises
from tests.strategies import randn
from tests.tiny import tiny_config

CPU = torch.device("cpu")
SETTINGS = TrainingSettings(learning_rate=5e-3, batch_size=2, warmup_steps=0)
# Answers of 1 to 8 tokens: what weighs rows instead of tokens shows.
EXAMPLES = [Example(array("i", range(1 + i, 7 + 2 * i)), (Answer(5, 6 + i, 1.0),), i + 1) for i in range(8)]


def make_model(config: PretrainedConfig) -> PreTrainedModel:
    config.initializer_range = 0.2  # at the usual 0.02 a frozen random head cannot get far from uniform
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def make_spec(config: PretrainedConfig, *, rank: int) -> Spec:
    lora = LoraSettings(rank=rank)
    return Spec(
        base_model="tiny", base_config=structure(config), layout=adapter_layout(config, lora), lora=lora
    )


def make_trainer(
    config: PretrainedConfig | None = None,
    *,
    settings: TrainingSettings = SETTINGS,
    examples: list[Example] = EXAMPLES,
    autocast: torch.dtype = torch.float32,
    position: int = 0,
    **own: int,
) -> Trainer:
    config = config or tiny_config()
    peft_model, flat = attach_adapter(make_model(config), make_spec(config, rank=4))
    return Trainer(
        model=peft_model,
        flat=flat,
        examples=examples,
        pad_id=0,
        settings=settings,
        seed=3,
        device=CPU,
        autocast=autocast,
        position=position,
        **own,
    )


def train(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.step().loss for _ in range(steps)]


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        LlamaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        ),
        GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5),
    ],
    ids=["qwen2", "llama", "gpt2"],
)
def test_the_loss_falls_and_the_base_stays(config: PretrainedConfig) -> None:
    """On three architectures, one of them with dropout in its config, which must not act."""
    trainer = make_trainer(config)
    model = trainer.model
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = train(trainer, 30)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert losses == train(make_trainer(config), 30)
    assert all(torch.equal(frozen[name], p) for name, p in model.named_parameters() if name in frozen)


def test_a_step_counts_rows_tokens_and_position() -> None:
    """2 × 3 rows a step; the position goes on from where it was, past the end of the file."""
    settings = TrainingSettings(batch_size=3, accumulate=2)
    trainer = make_trainer(settings=settings, position=100)
    result = trainer.step()
    assert (result.n_examples, result.position, trainer.position, result.applied) == (6, 106, 106, True)
    whole = make_trainer(settings=TrainingSettings(batch_size=8))
    assert whole.step().n_tokens == sum(len(example.input_ids) - 5 for example in EXAMPLES)


def test_accumulation_is_one_large_batch() -> None:
    """4 micro-batches of 2 rows and 1 of 8: the same loss and gradient, though their token counts differ."""
    small = make_trainer(settings=TrainingSettings(batch_size=2, accumulate=4))
    large = make_trainer(settings=TrainingSettings(batch_size=8))
    assert small.step().loss == pytest.approx(large.step().loss, rel=1e-5)
    torch.testing.assert_close(small.state()["exp_avg"], large.state()["exp_avg"], rtol=1e-4, atol=1e-8)


def weighed(*weights: float) -> list[Example]:
    return [
        Example(e.input_ids, (e.answers[0]._replace(weight=w),))
        for e, w in zip(EXAMPLES, weights, strict=False)
    ]


def test_half_the_weight_is_half_the_gradient() -> None:
    """Also if all of a step weigh the same; the loss that is said stays a mean per token."""
    settings = TrainingSettings(batch_size=2, accumulate=2, clip_norm=1e9)
    whole, half = (make_trainer(settings=settings, examples=weighed(*[weight] * 4)) for weight in (1.0, 0.5))
    results = whole.step(), half.step()
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
    assert results[0].n_tokens == results[1].n_tokens
    torch.testing.assert_close(half.state()["exp_avg"], whole.state()["exp_avg"] / 2, rtol=1e-5, atol=1e-12)


def test_each_answer_counts_by_its_weight() -> None:
    """The loss is a mean by weight; the gradient is the weighed sum, divided by the number of tokens."""
    settings = TrainingSettings(batch_size=1, accumulate=2, clip_norm=1e9)
    both = make_trainer(settings=settings, examples=weighed(1.0, 0.25))
    result = both.step()
    alone = [
        make_trainer(settings=replace(settings, accumulate=1), examples=[example])
        for example in weighed(1.0, 1.0)
    ]
    steps = [trainer.step() for trainer in alone]
    first, second = (step.loss * step.n_tokens for step in steps)
    n_first, n_second = (step.n_tokens for step in steps)
    assert result.n_tokens == n_first + n_second
    assert result.loss == pytest.approx((first + 0.25 * second) / (n_first + 0.25 * n_second), rel=1e-5)
    gradients = [
        trainer.state()["exp_avg"] * n for trainer, n in zip(alone, (n_first, n_second), strict=True)
    ]
    torch.testing.assert_close(
        both.state()["exp_avg"], (gradients[0] + 0.25 * gradients[1]) / result.n_tokens, rtol=1e-4, atol=1e-7
    )


def test_a_resumed_trainer_goes_on_to_the_same_bits() -> None:
    """10 steps at once, and 5 steps, a checkpoint, a new trainer and 5 more: the same losses and weights."""
    settings = TrainingSettings(batch_size=2, accumulate=2, warmup_steps=8, weight_decay=0.1)
    whole = make_trainer(settings=settings)
    losses = train(whole, 10)
    first = make_trainer(settings=settings)
    start = train(first, 5)
    state, flat, position = first.state(), first.flat.clone(), first.position
    train(first, 1)  # what was saved must not move with the trainer
    second = make_trainer(settings=settings, position=position)
    second.flat.copy_(flat)
    second.load_state(state)
    assert start + train(second, 5) == losses
    assert torch.equal(second.flat, whole.flat)
    assert all(torch.equal(second.state()[name], value) for name, value in whole.state().items())


def test_the_state_before_the_first_step_can_be_saved() -> None:
    """A worker may write a checkpoint before it has trained."""
    fresh, other = make_trainer(), make_trainer()
    other.load_state(fresh.state())
    assert train(other, 2) == train(fresh, 2)


def test_a_correction_between_steps_is_trained_on() -> None:
    """What a pull adds to `flat` counts in the next step, and what the step does is added to it."""
    moved, there = make_trainer(), make_trainer()
    train(moved, 1)
    there.load_state(moved.state())
    there.position = moved.position
    correction = randn(1, moved.flat.numel()) * 0.05
    there.flat.copy_(moved.flat + correction)
    moved.flat.add_(correction)
    assert train(moved, 2) == train(there, 2)
    assert torch.equal(moved.flat, there.flat)
    assert train(make_trainer(), 2)[1:] != train(moved, 1)


def test_a_loss_that_is_not_finite_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The step is skipped, counted and said; the rows are passed over, and training goes on."""
    trainer = make_trainer()
    train(trainer, 1)
    state, before = trainer.state(), trainer.flat.clone()
    trainer.flat[0] = torch.inf
    result = trainer.step()
    assert (result.applied, trainer.skipped, result.position) == (False, 1, 4)
    assert "step skipped" in caplog.text
    assert torch.equal(trainer.flat[1:], before[1:])
    assert all(torch.equal(trainer.state()[name], value) for name, value in state.items())
    trainer.flat[0] = before[0]
    assert trainer.step().applied
    assert trainer.flat.isfinite().all()


def test_the_gradient_is_clipped_to_its_norm() -> None:
    """AdamW's first moment after one step is a tenth of the clipped gradient."""
    clipped = make_trainer(settings=TrainingSettings(clip_norm=1e-3))
    free = make_trainer(settings=TrainingSettings(clip_norm=1e9))
    train(clipped, 1)
    train(free, 1)
    norm = free.state()["exp_avg"].norm().item()
    assert norm > 1e-2
    assert clipped.state()["exp_avg"].norm().item() == pytest.approx(1e-4, rel=1e-3)


def test_the_learning_rate_warms_up() -> None:
    """The first step of Adam moves the values with a gradient by the learning rate: here a quarter of it."""
    for warmup, factor in ((4, 0.25), (0, 1.0)):
        trainer = make_trainer(
            settings=TrainingSettings(learning_rate=1e-2, warmup_steps=warmup, clip_norm=1e9)
        )
        before = trainer.flat.clone()
        train(trainer, 1)
        assert (trainer.flat - before).abs().max().item() == pytest.approx(1e-2 * factor, rel=1e-3)


def test_bf16_autocast_trains_an_fp32_adapter() -> None:
    """Nearly the losses of fp32, not the same ones, and the vector is fp32 throughout."""
    full, half = make_trainer(), make_trainer(autocast=torch.bfloat16)
    expected, losses = train(full, 10), train(half, 10)
    assert losses == pytest.approx(expected, rel=0.05)
    assert losses != expected
    assert half.flat.dtype == torch.float32


def test_a_model_that_does_not_train_exactly_flat_is_refused() -> None:
    """A parameter elsewhere, or values of `flat` that no parameter has: a mistake in the program."""
    trainer = make_trainer()
    model, flat = trainer.model, trainer.flat
    options: dict[str, Any] = {
        "examples": EXAMPLES, "pad_id": 0, "settings": SETTINGS, "seed": 0, "device": CPU,
    }  # fmt: skip
    with pytest.raises(ValueError, match="the model trains 0 values"):
        Trainer(model=model, flat=flat.clone(), **options)
    base = next(p for name, p in model.named_parameters() if ".lora_" not in name)
    base.requires_grad_(True)
    with pytest.raises(ValueError, match="is trainable, but no view of flat"):
        Trainer(model=model, flat=flat, **options)
    base.requires_grad_(False)
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    with pytest.raises(ValueError, match="the model trains"):
        Trainer(model=model, flat=flat, **options)


class SmallMemory:
    """Stands for completion_loss on a device with room for so many rows, of so many tokens each, at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int = 99, tokens: int = 99) -> None:
        self.rows, self.tokens = rows, tokens
        self.failures = 0
        self._loss = completion_loss
        monkeypatch.setattr("producers.trainer.completion_loss", self)

    def __call__(self, model: nn.Module, batch: Batch, **options: Any) -> torch.Tensor:
        loss = self._loss(model, batch, **options)
        rows, tokens = batch.input_ids.shape
        if rows > self.rows or tokens > self.tokens:
            self.failures += 1
            torch.autograd.backward(loss)  # what came before it had run out stays in the gradient
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"
            )
        return loss


def test_a_micro_batch_that_does_not_fit_is_halved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """8 rows at a time become 4, then 2: the same loss, gradient and position; said once, and never tried again."""
    settings = TrainingSettings(batch_size=8, warmup_steps=0)
    whole = make_trainer(settings=settings)
    expected = [whole.step() for _ in range(3)]
    memory = SmallMemory(monkeypatch, rows=3)
    split = make_trainer(settings=settings)
    results = [split.step() for _ in range(3)]
    assert [r.loss for r in results] == pytest.approx([r.loss for r in expected], rel=1e-4)
    assert [(r.n_examples, r.n_tokens, r.position) for r in results] == [
        (r.n_examples, r.n_tokens, r.position) for r in expected
    ]
    torch.testing.assert_close(split.state()["exp_avg"], whole.state()["exp_avg"], rtol=1e-3, atol=1e-7)
    assert memory.failures == 2
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [
        f"{n} examples at a time do not fit into the memory of cpu" for n in (8, 4)
    ]
    again = make_trainer(settings=settings)
    again.load_state(split.state())
    again.step()
    assert memory.failures == 2


def test_an_example_that_does_not_fit_alone_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The step is that of the others; it is named once, not tried again, and not counted as learnt."""
    fitting = [example for example in EXAMPLES if len(example.input_ids) <= 10]
    without = make_trainer(
        settings=TrainingSettings(batch_size=len(fitting), warmup_steps=0), examples=fitting
    )
    without.step()
    memory = SmallMemory(monkeypatch, tokens=10)
    trainer = make_trainer(settings=TrainingSettings(batch_size=len(EXAMPLES), warmup_steps=0))
    result = trainer.step()
    assert (result.n_examples, result.position, result.applied) == (len(fitting), len(EXAMPLES), True)
    torch.testing.assert_close(trainer.state()["exp_avg"], without.state()["exp_avg"], rtol=1e-4, atol=1e-8)
    left_out = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert sorted(left_out) == [
        f"the example of line {n + 1} ({len(EXAMPLES[n].input_ids)} tokens) does not fit into the memory of cpu even "
        "alone: it is left out"
        for n in range(len(fitting), len(EXAMPLES))
    ]
    failures = memory.failures
    trainer.step()
    again = make_trainer(settings=TrainingSettings(batch_size=1))
    again.load_state(trainer.state())
    steps = [again.step() for _ in EXAMPLES]
    assert memory.failures == failures
    assert sum(step.applied for step in steps) == len(fitting)
    assert again.position == len(EXAMPLES)


def test_if_nothing_fits_it_ends_and_blames_no_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else may have taken the memory: with it back, the same trainer goes on with all examples."""
    memory = SmallMemory(monkeypatch, rows=0)
    trainer = make_trainer(examples=EXAMPLES * 3)
    with raises(TooLittleMemoryError, about="memory"):
        train(trainer, 5)
    memory.rows = 99
    before = trainer.position
    assert [trainer.step().n_examples for _ in range(12)] == [2] * 12
    assert trainer.position == before + 24


def test_another_error_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in the program is raised as it is."""

    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr("producers.trainer.completion_loss", fail)
    with pytest.raises(RuntimeError, match="must match"):
        make_trainer().step()
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))


def test_trainer_that_adopts_settings_is_one_that_was_made_with_them() -> None:
    """Of every setting but the length of rows, which are tokenized already.

    Not to the bit: the other one has the smaller micro-batch of the checkpoint, so it adds up in another order.
    """
    other = TrainingSettings(
        learning_rate=1e-3, weight_decay=0.1, batch_size=3, accumulate=2, warmup_steps=6, clip_norm=0.1
    )
    changed = make_trainer()
    train(changed, 3)
    made = make_trainer(settings=other)
    made.flat.copy_(changed.flat)
    made.load_state(changed.state())
    made.position = changed.position
    changed.adopt(other)
    assert train(changed, 3) == pytest.approx(train(made, 3))
    torch.testing.assert_close(changed.flat, made.flat)
    assert changed.position == made.position == 3 * 2 + 3 * 6


def test_own_batch_size_goes_before_the_rules(caplog: pytest.LogCaptureFixture) -> None:
    """A worker with a smaller GPU keeps it, and says so."""
    caplog.set_level(logging.INFO)
    trainer = make_trainer(batch_size=1)
    assert trainer.step().n_examples == 1
    trainer.adopt(TrainingSettings(batch_size=5, accumulate=3))
    assert trainer.step().n_examples == 3
    assert caplog.messages == ["this worker keeps its own --batch-size 1"]


def test_micro_batch_that_did_not_fit_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the rules say; one that fits is as large as they say."""
    memory = SmallMemory(monkeypatch, rows=3)
    trainer = make_trainer(settings=TrainingSettings(batch_size=4))
    trainer.step()
    assert memory.failures == 1
    trainer.adopt(TrainingSettings(batch_size=8))
    trainer.step()
    assert memory.failures == 1
    trainer.adopt(TrainingSettings(batch_size=1))
    assert trainer.step().n_examples == 1
