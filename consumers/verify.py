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
    """The outcome: `weights` recomputed at `version`, or why the log cannot be replayed."""

    version: int
    weights: AdapterBuffer
    problem: str = ""


def replay(spec: Spec, lines: Iterable[Mapping[str, str]], archive: Archive, *, upto: int) -> Replay:
    """Recompute the weights at version `upto` from the log's lines (oldest first) and the kept updates.

    Each line is held against its update: the version it made, the staleness and the factor that follow from the
    spec. A line that does not fit ends the replay with the problem.
    """
    buffer = AdapterBuffer(spec.layout)
    buffer.flat.copy_(initial_weights(spec.layout, spec.init_seed))
    delta = torch.empty(spec.layout.numel)
    version = 0
    for line in lines:
        if version == upto:
            break
        try:
            _check(
                int(line["version"]) == version + 1,
                f"the log goes from version {version} to {line['version']}",
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
            return Replay(version, buffer, f"version {version + 1}: {error}")
        fold(buffer.flat, delta, factor)
        version += 1
    problem = "" if version == upto else f"the log ends at version {version}, the expert is at {upto}"
    return Replay(version, buffer, problem)


def _check(true: bool, problem: str) -> None:
    if not true:
        raise UpdateError(problem)
