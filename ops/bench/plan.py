"""How much is measured: all of it, what fits into eight minutes, or next to nothing for the tests of the harness."""

from dataclasses import dataclass
from pathlib import Path

from fedmoe.protocol.formats import FORMATS
from fedmoe.protocol.rules import RuleSet
from ops.bench.fedmoe_side import DEFAULT_FORMAT

NEW_GATEWAY = RuleSet().for_gateway()  # its rules, unless an operator chooses others


@dataclass(frozen=True, slots=True)
class Overlap:
    """A worker that syncs every `interval_s`: in each round `window_s` with its sync on, and as long with it off."""

    interval_s: float
    window_s: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Quality:
    """Trainings of `syncs` × `steps` steps of each of two workers, tested on `rows` held-out rows a domain."""

    domains: tuple[str, ...]
    syncs: int
    steps: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """Parts of `ops.bench.learning.runs.PARTS`, each with `seeds` seeds, tested on `rows` held-out rows a domain.

    `keep` is the directory of the runs' outcomes, None if they are not kept; `short` has bars of its own.
    """

    parts: tuple[str, ...]
    rows: int
    seeds: int
    short: bool = False
    keep: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """FedMoE beside Flower to a loss; see `ops.bench.race`.

    Args:
        step_s: seconds of an ordinary client's step; steps: it takes at most so many.
        sync_s: seconds between two updates of a client of FedMoE.
        round_steps: lengths of Flower's rounds. Each runs its own race, and the fastest counts.
        apart_steps: steps of the experts trained apart, which fix the loss to reach; rows: held-out, of a domain.
    """

    step_s: float
    steps: int
    sync_s: float = NEW_GATEWAY.sync_interval_s
    round_steps: tuple[int, ...]
    apart_steps: int
    rows: int

    @property
    def label(self) -> str:
        """For the names of files."""
        return f"{self.steps}x{self.step_s:g}s-n{self.rows}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes and durations.

    Args:
        rounds: turns of every contestant.
        seconds: of a turn.
        size: of the adapter that the bars are about (a key of adapters.LAYOUTS); other_sizes: measured besides.
        large: size of an adapter that is measured for its memory.
        formats: wire formats to measure.
        raw_besides: also what raw Redis does with the bytes of the other formats, and with weights in chunks.
        aof: with the append-only file off, and everysec.
        overlap: of training and sync, for each interval; overlap_hidden is the model's hidden size.
        turns: of a worker that trains expert and gateway by turns.
        workers, experts: how many of them, for the cost of an update as a federation grows.
        scale: numbers of workers of 16 experts, the fewest first; idle_s: seconds for which an idle one is watched.
        updates: small updates after which memory must not have grown.
        quality: trainings in each format.
        learning: trained, merged and centralised gateways.
        race: to a loss, beside Flower.
        before: git revision of the release before; None if nothing is compared with it.
    """

    rounds: int = 5
    seconds: float
    size: str = "9mib"
    large: str = "153mib"
    other_sizes: tuple[str, ...] = ()
    formats: tuple[str, ...]
    raw_besides: bool = False
    aof: tuple[bool, ...] = (False,)
    overlap: tuple[Overlap, ...]
    overlap_hidden: int = 512
    turns: Overlap
    workers: tuple[int, ...]
    experts: tuple[int, ...]
    scale: tuple[int, ...]
    idle_s: float
    updates: int
    quality: Quality
    learning: Learning
    race: Race
    before: str | None = None


_NEEDED = tuple(dict.fromkeys(["fp32", DEFAULT_FORMAT]))
QUICK = Plan(
    seconds=4.0,
    formats=_NEEDED,
    overlap=(Overlap(10.0, 10.0, rounds=5), Overlap(1.0, 4.0, rounds=15)),
    turns=Overlap(5.0, 12.0, rounds=5),
    workers=(1, 4, 16, 64),
    experts=(1, 8, 32),
    scale=(64, 1000),
    idle_s=10.0,
    updates=2_000,
    quality=Quality(("sql_expert", "python_expert", "docs_expert"), syncs=12, steps=2, rows=32),
    learning=Learning(parts=("short",), rows=32, seeds=1, short=True),
    race=Race(step_s=5.0, steps=72, round_steps=(6,), apart_steps=48, rows=16),
)
FULL_LEARNING = (
    "main", "shared", "formats", "optimizers", "opt_out", "time", "real", "six", "lengths", "ranks", "mixes",
)  # fmt: skip
FULL = Plan(
    seconds=6.0,
    other_sizes=("1mib", "34mib"),
    formats=tuple(FORMATS),
    raw_besides=True,
    aof=(False, True),
    overlap=(Overlap(10.0, 20.0, rounds=9), Overlap(1.0, 6.0, rounds=15)),
    turns=Overlap(10.0, 24.0, rounds=9),
    workers=(1, 4, 16, 64),
    experts=(1, 8, 32),
    scale=(64, 128, 256, 512, 768, 1000),
    idle_s=20.0,
    updates=100_000,
    quality=Quality(("sql_expert", "python_expert", "docs_expert"), syncs=48, steps=2, rows=64),
    learning=Learning(parts=FULL_LEARNING, rows=128, seeds=3),
    race=Race(step_s=5.0, steps=72, round_steps=(6, 12, 3), apart_steps=48, rows=16),
)
TINY = Plan(
    rounds=1,
    seconds=0.3,
    size="64kib",
    large="64kib",
    formats=_NEEDED,
    overlap=(Overlap(0.5, 0.5, rounds=1),),
    turns=Overlap(0.3, 1.2, rounds=1),
    overlap_hidden=32,
    workers=(1,),
    experts=(2,),
    scale=(2, 4),
    idle_s=1.0,
    updates=40,
    quality=Quality(("sql_expert",), syncs=1, steps=1, rows=2),
    learning=Learning(parts=("tiny",), rows=2, seeds=1, short=True),
    race=Race(step_s=0.1, steps=2, sync_s=0.1, round_steps=(1, 2), apart_steps=1, rows=1),
)
