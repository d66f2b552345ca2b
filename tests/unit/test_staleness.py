"""fedmoe.protocol.staleness: the decay functions, and the two reasons for the default."""

import json
import math
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.errors import SettingsError
from fedmoe.protocol.rules import AggregationRules
from fedmoe.protocol.staleness import KINDS, Decay, staleness_of
from tests.errors import raises
from tests.strategies import MAX_COUNT, decays

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "decay.json").read_text())
staleness = st.integers(0, MAX_COUNT)


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['kind']} a={row['a']} b={row['b']}")
def test_golden_tables(row: dict[str, object]) -> None:
    """The factors at τ = 0, 1, 2, 5, 20, worked out by hand from the formulas."""
    factors = row.pop("factors")
    assert isinstance(factors, dict)
    decay = Decay(**row)
    assert {tau: decay(int(tau)) for tau in factors} == pytest.approx(factors, rel=1e-12)


@given(decays(), staleness, staleness)
def test_a_decay_starts_at_one_and_never_rises(decay: Decay, first: int, second: int) -> None:
    """s(0) = 1, 0 ≤ s ≤ 1, and a staler update never weighs more."""
    fresh, stale = decay(min(first, second)), decay(max(first, second))
    assert decay(0) == 1.0
    assert 0.0 <= stale <= fresh <= 1.0


@given(staleness, staleness)
def test_staleness_counts_versions(version: int, base_version: int) -> None:
    """The versions since the base; 0 if the base is newer."""
    assert staleness_of(version, base_version) == max(0, version - base_version)
    assert staleness_of(version, version) == 0


@pytest.mark.parametrize("kind", ["exponential", "", "Polynomial"])
def test_unknown_kinds_are_refused(kind: str) -> None:
    """Also one that differs in a letter."""
    with raises(SettingsError, about="decay"):
        Decay(kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [{"a": -1.0}, {"a": math.nan}, {"b": math.inf}, {"b": -0.5}])
def test_impossible_parameters_are_refused(kind: str, bad: dict[str, float]) -> None:
    """Negative or not finite: refused for every kind."""
    with raises(SettingsError, about=f"decay_{next(iter(bad))}"):
        Decay(kind=kind, **bad)


def test_negative_staleness_is_a_bug() -> None:
    """Decay is never asked about the future."""
    with pytest.raises(ValueError, match="cannot be negative, got -1"):
        Decay()(-1)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_equal_workers_in_rotation_each_weigh_one_over_their_number(workers: int) -> None:
    """M workers in turn have τ = M−1 in steady state: with a = 1 each weighs 1/M."""
    decay = Decay()
    bases = [0] * workers
    weights = []
    for version in range(5 * workers):
        worker = version % workers
        weights.append(decay(staleness_of(version, bases[worker])))
        bases[worker] = version + 1
    assert weights[workers - 1 :] == [1 / workers] * (len(weights) - workers + 1)


def last_error(gain: float, delay: int, steps: int = 40_000) -> float:
    """|x| after many steps x ← x − gain · x_delayed (the gradient of x²/2, `delay` steps old), from x = 1."""
    past = deque([1.0] * (delay + 1), maxlen=delay + 1)
    for _ in range(steps):
        past.append(past[-1] - gain * past[0])
        if abs(past[-1]) > 1e6:
            break
    return max(map(abs, past))


@pytest.mark.parametrize("delay", [0, 1, 2, 4, 8])
def test_delayed_steps_are_stable_up_to_the_known_threshold(delay: int) -> None:
    """On a quadratic a delay of τ allows a gain of 2 sin(π / (2(2τ+1))), and no more."""
    threshold = 2 * math.sin(math.pi / (2 * (2 * delay + 1)))
    assert last_error(0.99 * threshold, delay) < 1e-3
    assert last_error(1.01 * threshold, delay) > 1e3


@pytest.mark.parametrize("delay", range(0, 33, 4))
def test_the_default_decay_is_stable_for_every_delay(delay: int) -> None:
    """With (1+τ)^-1 a full local step (gain 1) converges whatever the delay."""
    assert last_error(Decay()(delay), delay, steps=4000) < 1e-3


def test_weaker_decays_are_not() -> None:
    """Without decay a full step fails from τ = 2, with (1+τ)^-0.5 from τ = 3: why the default is a = 1."""
    assert last_error(Decay(kind="constant")(2), 2) > 1e3
    assert last_error(Decay(a=0.5)(2), 2) < 1e-3
    assert last_error(Decay(a=0.5)(3), 3) > 1e3


@pytest.mark.parametrize(
    ("workers", "gain", "share"), [(1, 2.0, 1.0), (2, 2.0, 1.0), (3, 2.0, 2 / 3), (8, 2.0, 1 / 4)]
)
def test_gain_counts_a_round_more_than_once_but_no_update_more_than_once(
    workers: int, gain: float, share: float
) -> None:
    """M equal workers weigh gain / M each; a lone one keeps its 1."""
    assert AggregationRules(gain=gain).factor(workers - 1) == pytest.approx(share)
    assert AggregationRules(gain=gain, lr=0.5).factor(workers - 1) == pytest.approx(share / 2)


@given(decays(), staleness)
def test_without_gain_the_factor_is_lr_times_decay(decay: Decay, stale: int) -> None:
    """To the bit, so that logs of before replay."""
    assert AggregationRules(decay=decay, lr=0.7).factor(stale) == 0.7 * decay(stale)


@pytest.mark.parametrize("delay", range(0, 33, 4))
def test_gain_is_stable_for_every_delay_up_to_half_pi(delay: int) -> None:
    """With full local steps up to π/2; a gain of 2 needs local steps that go at most 0.78 of the way."""
    assert last_error(AggregationRules(gain=0.99 * math.pi / 2).factor(delay), delay) < 1e-3
    assert last_error(0.78 * AggregationRules(gain=2.0).factor(delay), delay) < 1e-3


def test_gain_of_two_is_unstable_with_full_steps_of_many_workers() -> None:
    """So the bound of the rule's help is no decoration."""
    assert last_error(AggregationRules(gain=2.0).factor(8), 8) > 1e3
