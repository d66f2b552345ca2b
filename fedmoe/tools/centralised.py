"""One adapter trained on the rows of all experts at one place: what a federation could reach if it shared its data.

It is trained with several learning rates in turn, and the best is chosen on a validation split of the training rows,
so that the bound is a fair one; the test rows have no part in it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedmoe.data.encode import Example
from fedmoe.data.flat import FlatExamples
from fedmoe.errors import SettingsError
from fedmoe.protocol.records import Meta
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.protocol.spec import Spec
from fedmoe.tools.base import Base
from fedmoe.tools.evaluate import MEAN, Adapter, evaluate

CENTRALISED = "centralised"
VALIDATION_SHARE, MIN_VALIDATION_ROWS = 0.02, 8
RATES = (1.0, 0.5, 0.25)  # times the rules' learning rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A training to do.

    Args:
        base: the bare base model; it is bare again afterwards.
        spec: of the adapter. training: its settings.
        examples: to train on, of all experts. steps: number of optimizer steps.
    """

    base: Base
    spec: Spec
    training: TrainingSettings
    examples: Sequence[Example]
    steps: int


Train = Callable[
    [Job, Callable[[str], None]], memoryview
]  # its progress lines go to the callable; returns the file


@dataclass(frozen=True, slots=True, kw_only=True)
class Centralised:
    """How the centralised adapter came to be.

    Args:
        rows: expert -> number of examples that were trained on.
        steps: optimizer steps.
        learning_rate: the best one. validation: learning rate -> mean over the domains of the validation loss.
    """

    rows: Mapping[str, int]
    steps: int
    learning_rate: float
    validation: Mapping[str, float]


def split(expert: str, examples: Sequence[Example]) -> tuple[FlatExamples, FlatExamples]:
    """The training and the validation examples: 2 % of the rows, at least 8, are held out, spread evenly.

    The examples of a row stay together. If all rows are in one line of the file, each example counts as a row.

    Raises:
        SettingsError: if no row is left to train on.
    """
    lines = [example.line for example in examples]
    places = lines if len(set(lines)) > 1 else list(range(len(examples)))
    rows = sorted(set(places))
    count = max(MIN_VALIDATION_ROWS, round(VALIDATION_SHARE * len(rows)))
    if len(rows) <= count:
        raise SettingsError(
            f"--train has {len(rows)} rows of {expert}, and {count} are held out to choose the learning rate: give at "
            f"least {count + 1}",
            about="train",
        )
    held = {rows[number * len(rows) // count] for number in range(count)}
    training, validation = FlatExamples(), FlatExamples()
    for place, example in zip(places, examples, strict=True):
        (validation if place in held else training).extend([example])
    return training, validation


def n_steps(n_examples: int, training: TrainingSettings) -> int:
    """The optimizer steps that this many examples are worth.

    Raises:
        SettingsError: if they are worth none.
    """
    if n_examples < 1:
        raise SettingsError(
            "the experts were not trained yet, so nothing says how long to train the centralised adapter: give --steps",
            about="steps",
        )
    return math.ceil(n_examples / (training.batch_size * training.accumulate))


def centralise(
    base: Base,
    specs: Mapping[str, Spec],
    metas: Mapping[str, Meta],
    examples: Mapping[str, Sequence[Example]],
    train: Train,
    *,
    steps: int | None,
    learning_rates: Sequence[float],
    batch_size: int,
    report: Callable[[str], None],
) -> tuple[Adapter, Centralised]:
    """Train the adapter on the examples of all experts, with spec and training rules of the first of them.

    `examples` are the training examples by expert; `specs` and `metas` may be of more experts. `train` trains one
    adapter. Without `steps`, it gets as many as the updates of these experts are worth; without `learning_rates`, those
    of RATES are tried. `batch_size` is that of the validation, and `report` prints a line.
    """
    first = next(iter(examples))
    training = metas[first].rules.training
    if any((specs[n].lora, metas[n].rules.training) != (specs[first].lora, training) for n in examples):
        report(
            f"the experts' LoRA shapes or training rules differ: {CENTRALISED} is trained with those of {first}"
        )
    halves = {name: split(name, rows) for name, rows in examples.items()}
    mixed = FlatExamples()
    for rows, _ in halves.values():
        mixed.extend(rows)
    job = Job(
        base=base,
        spec=specs[first],
        training=training,
        examples=mixed,
        steps=steps or n_steps(sum(metas[name].n_examples for name in examples), training),
    )
    best, rate, losses = _best(
        job,
        learning_rates or [factor * training.learning_rate for factor in RATES],
        {name: held for name, (_, held) in halves.items()},
        train,
        batch_size=batch_size,
        report=report,
    )
    return best, Centralised(
        rows={name: len(rows) for name, (rows, _) in halves.items()},
        steps=job.steps,
        learning_rate=rate,
        validation=losses,
    )


def _best(
    job: Job,
    rates: Sequence[float],
    validation: Mapping[str, Sequence[Example]],
    train: Train,
    *,
    batch_size: int,
    report: Callable[[str], None],
) -> tuple[Adapter, float, dict[str, float]]:
    """Train with each learning rate; the adapter of the lowest validation loss, its rate, and the loss of each rate."""
    best, chosen, lowest = None, math.nan, math.inf
    losses: dict[str, float] = {}
    for rate in rates:
        what = f"{CENTRALISED} with learning rate {rate:g}"
        report(f"training {what}: {job.steps} steps")
        file = train(replace(job, training=replace(job.training, learning_rate=rate)), report)
        adapter = Adapter(file=file, config=job.spec.adapter_config())
        loss = losses[f"{rate:g}"] = _validation_loss(job.base, adapter, validation, batch_size)
        report(f"{what}: validation loss {loss:.3f}")
        if best is None or loss < lowest:
            best, chosen, lowest = adapter, rate, loss if math.isfinite(loss) else math.inf
    assert best is not None
    report(
        f"{CENTRALISED} has learning rate {chosen:g}, the best of {', '.join(losses)} on rows held out of --train"
    )
    return best, chosen, losses


def _validation_loss(
    base: Base, adapter: Adapter, validation: Mapping[str, Sequence[Example]], batch_size: int
) -> float:
    matrix = evaluate(
        base.model, {CENTRALISED: adapter}, validation,
        pad_id=base.pad_id, batch_size=batch_size, device=base.device, autocast=base.autocast,
    )  # fmt: skip
    return matrix[CENTRALISED][MEAN]
