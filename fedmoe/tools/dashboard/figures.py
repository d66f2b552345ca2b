"""Figures from a chronicle: curves, throughput, how stale updates were, what each worker contributed. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmoe.protocol.chronicle import Chronicle, Step

MOST_POINTS = 400  # of a curve; more are averaged
MOST_CURVES = 12  # validation curves of workers; those that were measured last
SPARK_POINTS = 40
RATE_S = 300.0  # rates are over this time
BUCKETS = 30  # of the throughput
STALENESS = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """A worker's part in the kept steps of an expert; `share` of the sum of the steps' lengths."""

    updates: int = 0
    examples: int = 0
    share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What does not change until a line is added.

    Args:
        training: a curve of the training loss: version, loss.
        spark: the last training losses, for a small picture.
        validation: worker → its curve: version, loss, rows.
        staleness: how many updates had which staleness.
        contributions: worker → its part.
        worker_losses: worker → the training losses that it reported: version, loss.
    """

    training: Mapping[str, list[Any]]
    spark: Sequence[float]
    validation: Mapping[str, Mapping[str, Any]]
    staleness: Sequence[Mapping[str, int | None]]
    contributions: Mapping[str, Contribution]
    worker_losses: Mapping[str, Mapping[str, list[Any]]]


def figures_of(chronicle: Chronicle) -> Figures:
    """Compute the figures of a chronicle."""
    losses = [
        (step.version, step.loss)
        for step in chronicle.steps
        if step.loss is not None and step.version is not None
    ]
    return Figures(
        training=_curve(list(thinned(losses, MOST_POINTS))),
        spark=[loss for _, loss in thinned(losses, SPARK_POINTS)],
        validation=_validation(chronicle.steps),
        staleness=_staleness(chronicle.steps),
        contributions=_contributions(chronicle.steps),
        worker_losses=_worker_losses(chronicle.steps),
    )


def thinned(points: Sequence[tuple[int, float]], most: int) -> Iterator[tuple[int, float]]:
    """At most `most` points: the mean of each group, at the version of its last point."""
    size = -(-len(points) // most) or 1
    for first in range(0, len(points), size):
        group = points[first : first + size]
        yield group[-1][0], sum(loss / len(group) for _, loss in group)  # no sum of huge losses is infinite


def _worker_losses(steps: Iterable[Step]) -> dict[str, Mapping[str, list[Any]]]:
    losses: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for step in steps:
        if step.loss is not None and step.version is not None:
            losses[step.worker].append((step.version, step.loss))
    return {worker: _curve(list(thinned(points, MOST_POINTS))) for worker, points in losses.items()}


def _curve(points: Sequence[tuple[int, float]]) -> dict[str, list[Any]]:
    return {"version": [version for version, _ in points], "loss": [loss for _, loss in points]}


def _validation(steps: Iterable[Step]) -> dict[str, Mapping[str, Any]]:
    points: dict[str, dict[int, float]] = {}
    rows: dict[str, int | None] = {}
    for step in steps:
        if step.val_loss is not None and step.val_version is not None:
            points.setdefault(step.worker, {})[step.val_version] = step.val_loss
            rows[step.worker] = step.val_rows
            points[step.worker] = points.pop(step.worker)  # the one measured last comes last
    newest = list(points)[-MOST_CURVES:]
    curves: dict[str, Mapping[str, Any]] = {}
    for worker in sorted(newest):
        thin = list(thinned(sorted(points[worker].items()), MOST_POINTS))
        curves[worker] = _curve(thin) | {"rows": rows[worker]}
    return curves


def _staleness(steps: Iterable[Step]) -> list[Mapping[str, int | None]]:
    counts = [0] * len(STALENESS)
    for step in steps:
        if step.staleness is not None and step.staleness >= 0:
            index = next(i for i, (_, last) in enumerate(STALENESS) if last is None or step.staleness <= last)
            counts[index] += 1
    return [
        {"first": first, "last": last, "updates": count}
        for (first, last), count in zip(STALENESS, counts, strict=True)
    ]


def _contributions(steps: Iterable[Step]) -> dict[str, Contribution]:
    updates: dict[str, int] = defaultdict(int)
    examples: dict[str, int] = defaultdict(int)
    sizes: dict[str, float] = defaultdict(float)
    for step in steps:
        updates[step.worker] += 1
        examples[step.worker] += step.examples
        sizes[step.worker] += step.size
    whole = sum(sizes.values())
    return {
        worker: Contribution(
            updates=count, examples=examples[worker], share=sizes[worker] / whole if whole else 0.0
        )
        for worker, count in updates.items()
    }


def rates(chronicle: Chronicle, now: float) -> tuple[float, float]:
    """Applied updates a minute and examples a second, over the last RATE_S seconds."""
    updates = examples = 0
    first = now
    for step in reversed(chronicle.steps):
        if step.at < now - RATE_S:
            first = now - RATE_S
            break
        updates, examples, first = updates + 1, examples + step.examples, step.at
    span = max(now - first, 10.0)  # an expert may be younger
    return updates * 60 / span, examples / span


def throughput(chronicle: Chronicle, now: float) -> dict[str, list[float]]:
    """Applied updates a minute in BUCKETS equal times from the oldest kept step until now, at most the last day."""
    if not chronicle.steps:
        return {"at": [], "updates_per_min": []}
    span = min(max(now - chronicle.steps[0].at, 60.0), 86_400.0)
    width = span / BUCKETS
    counts = [0] * BUCKETS
    for step in chronicle.steps:
        if step.at >= now - span:
            counts[min(BUCKETS - 1, int((step.at - now + span) / width))] += 1
    return {
        "at": [round(now - span + (i + 0.5) * width, 1) for i in range(BUCKETS)],
        "updates_per_min": [round(count * 60 / width, 3) for count in counts],
    }
