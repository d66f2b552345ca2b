"""What a worker measures: the base that it pulled, beside an untouched training, within its share of the time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedmoe.model.adapter import attach_adapter, switch_to
from fedmoe.protocol.rollback import Interval, RolledBack
from fedmoe.protocol.validation import Measured
from fedmoe.tools.evaluate import mean_loss
from producers.exchange import Exchange
from producers.trainer import Trainer
from producers.validation import VALIDATION_SHARE, Evaluator, Validation
from tests.federation import first_meta, small_spec
from tests.tiny import tiny_config
from tests.unit.test_trainer import CPU, EXAMPLES, SETTINGS, make_model, make_spec

META = first_meta(small_spec())


def make(*, held: bool, order: str = "after") -> tuple[Trainer, Evaluator | None]:
    """A trainer on the first five examples, and an evaluator on the others that share its model."""
    spec = make_spec(tiny_config(), rank=4)
    model, flat = attach_adapter(make_model(tiny_config()), spec, "adapter")
    trainer = Trainer(
        model=model, flat=flat, examples=EXAMPLES[:5], pad_id=0, settings=SETTINGS, seed=3, device=CPU,
        activate=switch_to(model, "adapter"),
    )  # fmt: skip
    if not held:
        return trainer, None
    shared, other = attach_adapter(model, spec, "validation", trainable=False)
    return trainer, Evaluator(
        model=shared, flat=other, activate=switch_to(shared, "validation"), examples=EXAMPLES[5:], rows=3,
        rows_set="set", batch_size=2, pad_id=0, device=CPU,
    )  # fmt: skip


def test_base_is_measured_and_the_training_is_untouched() -> None:
    """To the bit: the same steps as without validation, whatever is measured between them."""
    trainer, evaluator = make(held=True)
    alone, _ = make(held=False)
    assert evaluator is not None
    base = trainer.flat.clone() + 0.05
    for _ in range(4):
        evaluator.begin(7, base)
        assert evaluator.step() is None
        measured = evaluator.step()
        assert trainer.step() == alone.step()
        assert torch.equal(trainer.flat, alone.flat)
    fresh, flat = attach_adapter(make_model(tiny_config()), make_spec(tiny_config(), rank=4))
    with torch.no_grad():
        flat.copy_(base)
    expected = mean_loss(fresh, EXAMPLES[5:], pad_id=0, batch_size=2, device=CPU)
    assert measured == Measured(loss=pytest.approx(expected, rel=1e-6), version=7, rows=3, rows_set="set")


class Clocked:
    """An evaluator of four batches that each take this long, on a clock of its own."""

    def __init__(self, batch_s: float, loss: float = 1.5) -> None:
        self.now, self.batch_s, self.loss = 0.0, batch_s, loss
        self.began: list[int] = []
        self.batches = 0

    def begin(self, version: int, base: torch.Tensor) -> None:
        self.began.append(version)

    def step(self) -> Measured | None:
        self.now += self.batch_s
        self.batches += 1
        return None if self.batches % 4 else Measured(loss=self.loss, version=self.began[-1], rows=9)


class Still:
    """A trainer that an exchange can be made of."""

    flat = torch.zeros(3)
    position = 0


def exchange() -> Exchange:
    return Exchange(Still(), with_optimizer=False)


def run(
    evaluators: dict[str, Clocked], steps: int, *, step_s: float = 1.0
) -> tuple[Validation, dict[str, Exchange], list[str]]:
    """Train so many steps, with a new base at each."""
    said: list[str] = []
    meets = {name: exchange() for name in evaluators}
    validation = Validation(
        [(name, one, meets[name]) for name, one in evaluators.items()],
        report=lambda name, line: said.append(f"{name}: {line}"),
        clock=lambda: sum(one.now for one in evaluators.values()),
    )
    for meeting in meets.values():
        meeting.want_base()
    for step in range(steps):
        for meeting in meets.values():
            meeting.offer_base(replace(META, version=step), torch.zeros(3))
        validation.trained(step_s)
        validation.between_steps()
        assert validation.spent_s <= VALIDATION_SHARE * validation.trained_s + 1e-9
    return validation, meets, said


@pytest.mark.parametrize("batch_s", [0.1, 0.5, 1.0])
def test_validation_takes_its_share_of_the_time_and_no_more(batch_s: float) -> None:
    """At every moment; and it uses what it may."""
    evaluator = Clocked(batch_s)
    validation, meets, said = run({"sql": evaluator}, 2000)
    assert validation.spent_s >= 0.9 * VALIDATION_SHARE * validation.trained_s
    assert evaluator.began[0] == 0
    assert evaluator.began == sorted(set(evaluator.began))  # no version twice
    measured = meets["sql"].take_measured()
    assert measured is not None
    assert measured.version == evaluator.began[evaluator.batches // 4 - 1]
    assert meets["sql"].take_measured() is None  # once
    assert said[0] == "sql: validation loss 1.5000 on 9 rows at version 0"


def test_two_chains_share_the_time() -> None:
    """Each measures its own base, in turn."""
    both = {"sql": Clocked(0.5), "gateway": Clocked(0.5)}
    run(both, 2000)
    assert abs(both["sql"].batches - both["gateway"].batches) <= 4
    assert min(one.batches for one in both.values()) > 30


def measured_at(meet: Exchange, version: int) -> bool:
    """The training takes the base that it was offered, and publishes its loss."""
    base = meet.take_base()
    assert base is not None
    assert base[0] == version
    return meet.publish(Measured(loss=1.5, version=version, rows=9))


LEFT = {
    "created again": {"lineage": "other", "version": 1},
    "rolled back": {"version": 9, "rolled_back": RolledBack((Interval(3, 8),))},
    "failover": {"version": 5},
}


@pytest.mark.parametrize("now", LEFT.values(), ids=LEFT.keys())
def test_loss_of_a_history_that_the_expert_has_left_is_forgotten(now: dict[str, Any]) -> None:
    """One that waits for an update, one that is being measured, and a base that was not taken yet."""
    before, after = replace(META, version=8), replace(META, **now)
    for when in ("waits", "is measured", "is offered"):
        meet = exchange()
        meet.want_base()
        meet.offer_base(before, torch.zeros(3))
        if when == "waits":
            assert measured_at(meet, 8)
        elif when == "is measured":
            assert meet.take_base() is not None
        meet.want_base()
        meet.offer_base(after, torch.ones(3))
        if when == "is measured":
            assert not meet.publish(Measured(loss=1.5, version=8, rows=9))
        assert meet.take_measured() is None
        assert measured_at(meet, after.version)
        assert meet.take_measured() == Measured(loss=1.5, version=after.version, rows=9)


def test_base_that_was_forgotten_is_wanted_again() -> None:
    """The next one is copied, although the training has asked only once."""
    meet = exchange()
    meet.want_base()
    meet.offer_base(replace(META, version=8), torch.zeros(3))
    meet.offer_base(replace(META, version=1, lineage="other"), torch.ones(3))
    meet.offer_base(replace(META, version=2, lineage="other"), torch.ones(3))
    assert measured_at(meet, 1)


def test_loss_goes_with_a_later_version_of_the_same_history() -> None:
    meet = exchange()
    meet.want_base()
    meet.offer_base(replace(META, version=8), torch.zeros(3))
    assert measured_at(meet, 8)
    meet.offer_base(replace(META, version=9), torch.ones(3))
    assert meet.take_measured() == Measured(loss=1.5, version=8, rows=9)


def test_loss_of_another_history_is_not_reported() -> None:
    """Its line would name a version that the expert does not have."""
    evaluator, said, meet = Clocked(0.0), list[str](), exchange()
    validation = Validation(
        [("sql", evaluator, meet)], report=lambda name, line: said.append(line), share=1.0
    )
    meet.want_base()
    meet.offer_base(replace(META, version=8), torch.zeros(3))
    for step in range(16):
        if step == 2:
            meet.offer_base(replace(META, version=1, lineage="other"), torch.zeros(3))
        validation.trained(1.0)
        validation.between_steps()
        if step == 4:
            assert said == []
            meet.offer_base(replace(META, version=2, lineage="other"), torch.zeros(3))
    assert said == ["validation loss 1.5000 on 9 rows at version 2"]


def test_loss_that_is_no_number_is_not_published() -> None:
    """It is said, and the training goes on."""
    evaluator = Clocked(0.5, loss=float("nan"))
    _, meets, said = run({"sql": evaluator}, 500)
    assert evaluator.batches > 4
    assert (meets["sql"].take_measured(), said) == (None, [])


@pytest.mark.parametrize("make_error", [MemoryError, lambda: RuntimeError("CUDA out of memory")])
def test_validation_that_does_not_fit_ends_and_the_training_goes_on(
    make_error: Callable[[], Exception],
) -> None:
    """The rows stay held back; any other error is none to be hidden."""
    evaluator = Clocked(0.5)

    def fail() -> None:
        raise make_error()

    evaluator.step = fail
    validation, _, _ = run({"sql": evaluator}, 500)
    assert evaluator.began == [0]
    validation.between_steps()
