"""How much is measured: all of it, what fits into eight minutes, or next to nothing for the tests of the harness."""

from dataclasses import dataclass

from fedmoe.codec import FORMATS
from ops.bench.fedmoe_side import DEFAULT_FORMAT


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes and durations.

    Args:
        rounds: turns of every contestant.
        seconds: of a turn.
        size: of the adapter that the bars are about (a key of adapters.LAYOUTS); other_sizes: measured besides.
        formats: wire formats to measure.
        aof: with the append-only file off, and everysec.
        overlap_s: interval between syncs -> seconds with sync on, and off, in a round.
        workers, experts: how many of them, for the cost of an update as a federation grows.
        updates: small updates after which memory must not have grown.
    """

    rounds: int = 5
    seconds: float
    size: str = "9mib"
    other_sizes: tuple[str, ...] = ()
    formats: tuple[str, ...]
    aof: tuple[bool, ...] = (False,)
    overlap_s: tuple[tuple[float, float], ...]
    overlap_hidden: int = 512
    workers: tuple[int, ...]
    experts: tuple[int, ...]
    updates: int


_NEEDED = tuple(dict.fromkeys(["fp32", DEFAULT_FORMAT]))
QUICK = Plan(
    seconds=4.0,
    formats=_NEEDED,
    overlap_s=((10.0, 10.0), (1.0, 4.0)),
    workers=(1, 4, 16, 64),
    experts=(1, 8, 32),
    updates=2_000,
)
FULL = Plan(
    seconds=6.0,
    other_sizes=("1mib", "34mib"),
    formats=tuple(FORMATS),
    aof=(False, True),
    overlap_s=((10.0, 20.0), (1.0, 10.0)),
    workers=(1, 4, 16, 64),
    experts=(1, 8, 32),
    updates=10_000,
)
TINY = Plan(
    rounds=1,
    seconds=0.3,
    size="64kib",
    formats=_NEEDED,
    overlap_s=((0.5, 0.5),),
    overlap_hidden=32,
    workers=(1,),
    experts=(2,),
    updates=40,
)
