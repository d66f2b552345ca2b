"""Replay an expert from its log, one update at a time from version 0, and compare byte for byte."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from consumers.fold import fold
from fedmoe.archive import Archive
from fedmoe.codec import decode
from fedmoe.errors import UpdateError
from fedmoe.layout import AdapterBuffer
from fedmoe.lora_init import initial_weights
from fedmoe.spec import Spec
from fedmoe.staleness import staleness_of


@dataclass(frozen=True, slots=True)
class Replay:
    """The outcome: `weights` recomputed at `version`, or why the log cannot be replayed.

    `since` is the version it began at: 0, or that of weights an aggregator wrote back after Redis had lost the expert.
    """

    version: int
    weights: AdapterBuffer
    problem: str = ""
    since: int = 0


def replay(spec: Spec, lines: Iterable[Mapping[str, str]], archive: Archive, *, upto: int) -> Replay:
    """Recompute the weights at version `upto` from the log's lines (oldest first) and the kept updates.

    Each line is held against its update: the version it made, the staleness and the factor that follow from the
    spec. A line that does not fit ends the replay with the problem. A line that an aggregator wrote when it gave an
    expert back to a Redis that had lost it names kept weights, from which the replay goes on.
    """
    buffer = AdapterBuffer(spec.layout)
    buffer.flat.copy_(initial_weights(spec.layout, spec.init_seed))
    delta = torch.empty(spec.layout.numel)
    version = since = 0
    history = list(lines)
    written_back = [number for number, line in enumerate(history) if "restored" in line]
    for line in history[written_back[-1] if written_back else 0 :]:
        if version == upto and "restored" not in line:
            break
        try:
            if "restored" in line:
                _check(
                    "weights" in line,
                    f"an aggregator that kept no updates wrote version {line['version']} back to an emptied Redis",
                )
                buffer.load(archive.load_weights(line["weights"]))
                version = since = int(line["version"])
                continue
            _check(
                int(line["version"]) == version + 1,
                f"the log goes from version {version} to {line['version']}: what lies between is gone from Redis",
            )
            header, parts = archive.load(line.get("update", ""))
            _check(
                f"{header.run}:{header.seq}" == f"{line['run']}:{line['seq']}",
                "the kept update is another one",
            )
            staleness = staleness_of(version, header.base_version)
            factor = spec.merge.lr * spec.merge.decay(staleness)
            _check(
                int(line["staleness"]) == staleness, f"staleness {line['staleness']}, should be {staleness}"
            )
            _check(float(line["factor"]) == factor, f"factor {line['factor']}, should be {factor!r}")
            decode(parts, spec.wire_format, delta)
        except (UpdateError, KeyError, ValueError) as error:
            return Replay(version, buffer, f"version {version + 1}: {error}", since)
        fold(buffer.flat, delta, factor)
        version += 1
    problem = "" if version == upto else f"the log ends at version {version}, the expert is at {upto}"
    return Replay(version, buffer, problem, since)


def _check(true: bool, problem: str) -> None:
    if not true:
        raise UpdateError(problem)
