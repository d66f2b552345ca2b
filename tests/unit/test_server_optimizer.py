"""fedmoe.protocol.server and fold: the steps of the server optimizers, by closed form and by their bounds."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.errors import ProtocolError
from fedmoe.protocol import features
from fedmoe.protocol.balance import peers_of
from fedmoe.protocol.fold import Values, fold
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.records import Decided
from fedmoe.protocol.rules import ADAPTIVE, NESTEROV, SERVER_OPTIMIZERS, SGD, AggregationRules, RuleSet
from fedmoe.protocol.server import ServerStep, ends_round, first_value, has_state
from fedmoe.protocol.update import UpdateId
from tests.errors import raises
from tests.strategies import randn

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"


def values(numel: int = 1, rules: AggregationRules | None = None) -> Values:
    """Weights of zeros with a server state that begins."""
    return Values(torch.zeros(numel), torch.full((numel,), first_value(rules or AggregationRules())))


@pytest.mark.parametrize(("momentum", "workers"), [(0.5, 3), (0.9, 1), (0.0, 2)])
def test_nesterov_repeats_a_share_of_each_round(momentum: float, workers: int) -> None:
    """Rounds of M updates of 1, each folded with 1/M: after k rounds k + Σ_j β (1 − β^j) / (1 − β)."""
    rules = AggregationRules(server_optimizer=NESTEROV, server_momentum=momentum)
    now, rounds = values(rules=rules), 6
    for number in range(rounds * workers):
        step = ServerStep(rules, 1 / workers, ends_round=number % workers == workers - 1)
        fold(now, torch.ones(1), step)
    echo = sum(momentum * (1 - momentum**j) / (1 - momentum) for j in range(1, rounds + 1))
    assert float(now.weights) == pytest.approx(rounds + echo, rel=1e-5)
    assert float(now.state) == pytest.approx(momentum * (1 - momentum**rounds) / (1 - momentum), rel=1e-5)


@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS)
def test_the_default_dtype_changes_no_step(optimizer: str, of_bf16: None) -> None:
    """Every party folds to the same bits, whatever a training loop has set."""
    rules, results = AggregationRules(server_optimizer=optimizer), []
    for dtype in (torch.bfloat16, torch.float32):
        torch.set_default_dtype(dtype)
        now = Values(*torch.zeros(2, 1, dtype=torch.float32))
        fold(now, torch.tensor([1.0001], dtype=torch.float32), ServerStep(rules, 0.3, ends_round=True))
        results.append(now.weights)
    assert torch.equal(*results)


def test_nesterov_is_that_of_the_paper() -> None:
    """Liu et al., arXiv 2401.09135, algorithm 3 with c = 0 and N = 2, on updates that differ."""
    beta, updates = 0.7, [1.0, -3.0, 0.5, 2.0, 4.0, -1.0]
    rules = AggregationRules(server_optimizer=NESTEROV, server_momentum=beta)
    theta = moment = buffer = 0.0
    now = values(rules=rules)
    for number, delta in enumerate(updates):
        is_last = number % 2 == 1
        buffer += delta
        if is_last:
            moment, buffer = beta * moment + buffer / 2, 0.0
        theta += (beta * moment if is_last else 0.0) + delta / 2
        fold(now, torch.tensor([delta]), ServerStep(rules, 0.5, ends_round=is_last))
    assert float(now.weights) == pytest.approx(theta, rel=1e-5)


def test_adaptive_steps_shrink_to_the_size_of_lr() -> None:
    """Updates of one size d: square = β₂ⁿ ε² + (1 − β₂ⁿ) d², and each step is lr d / (√square + ε)."""
    lr, d, epsilon, beta2 = 0.01, 0.2, 0.1, 0.9
    rules = AggregationRules(lr=lr, server_optimizer=ADAPTIVE, server_epsilon=epsilon, server_beta2=beta2)
    now, wanted = values(rules=rules), 0.0
    for n in range(1, 30):
        fold(now, torch.tensor([d]), ServerStep(rules, rules.factor(0)))
        square = beta2**n * epsilon**2 + (1 - beta2**n) * d**2
        wanted += lr * d / (math.sqrt(square) + epsilon)
        assert float(now.state) == pytest.approx(square, rel=1e-4)
        assert float(now.weights) == pytest.approx(wanted, rel=1e-4)


@given(st.sampled_from(SERVER_OPTIMIZERS), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_parts_give_the_same_bits_as_the_whole(optimizer: str, cut: int, is_last: bool, seed: int) -> None:
    """Each value moves by itself, also from one buffer into another, which leaves the first as it was."""
    rules = AggregationRules(server_optimizer=optimizer)
    now, delta = Values(randn(seed, 50), randn(seed + 1, 50).abs()), randn(seed + 2, 50)
    step = ServerStep(rules, 0.3, is_last)
    before = Values(now.weights.clone(), now.state.clone())
    out = Values(torch.full((50,), torch.nan), torch.full((50,), torch.nan))
    for place in (slice(0, cut), slice(cut, 50)):
        fold(now.at(place), delta[place], step, out=out.at(place))
    assert torch.equal(now.weights, before.weights)
    assert torch.equal(now.state, before.state)
    fold(now, delta, step)
    assert torch.equal(out.weights, now.weights)
    assert torch.equal(out.state, now.state) or not has_state(rules)


def test_sgd_touches_no_state() -> None:
    """So its pages take no memory."""
    now = values()
    now.state.fill_(torch.nan)
    fold(
        now,
        torch.ones(1),
        ServerStep(AggregationRules(), 1.0, ends_round=True),
        out=Values(now.weights, now.state),
    )
    assert (float(now.weights), bool(now.state.isnan())) == (1.0, True)
    assert not has_state(AggregationRules(server_optimizer=SGD))


def test_who_lacks_the_feature_does_not_read_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fold every update by sgd; rules that go back to sgd need nothing."""
    rules = RuleSet().changed({"server_optimizer": NESTEROV})
    assert (rules.requires, rules.changed({"server_optimizer": SGD}).requires) == ("server_optimizer", "")
    assert RuleSet.from_json(rules.to_json()) == rules
    monkeypatch.setattr(features, "FEATURES", frozenset({features.HOLD}))
    with raises(ProtocolError, about="requires"):
        RuleSet.from_json(rules.to_json() + " ")  # another text, because parsed texts are remembered


def test_a_round_is_as_many_updates_as_there_are_active_workers() -> None:
    """Three of four workers are active, at a version far beyond the last round."""
    rules = AggregationRules(server_optimizer=NESTEROV)
    heads = {
        name: Decided(id=UpdateId("1-00000001", 1), how="applied", version=version)
        for name, version in {"a.x": 990, "b.y": 999, "c.z": 1000, "c.gone": 3}.items()
    }
    active = peers_of("sql_expert", "a.x", heads, 1000, rules).active
    assert active == peers_of(GATEWAY, "b.y", heads, 1000, rules).active == 3
    assert [ends_round(version, 997, active) for version in (997, 998, 999, 1000)] == [
        False,
        False,
        True,
        True,
    ]


def radius(workers: int, momentum: float, gain: float) -> float:
    """The spectral radius of one round on x²/2: M workers in rotation, each update −x of M − 1 updates before.

    The state is (x_t … x_{t−M+1}, server state).
    """
    size = workers + 1
    whole = np.eye(size)
    for number in range(workers):
        one = np.zeros((size, size))
        one[0, 0] = one[workers, workers] = 1.0
        one[0, workers - 1] -= gain / workers
        one[workers, workers - 1] -= gain / workers
        for place in range(1, workers):
            one[place, place - 1] = 1.0
        if number == workers - 1:
            one[workers] *= momentum
            one[0] += one[workers]
        whole = one @ whole
    return float(max(abs(np.linalg.eigvals(whole))))


def test_the_bounds_of_stability_that_the_page_gives() -> None:
    """For every momentum and number of workers in the table of docs/protocol.md; for one worker (2+2β) / (1+2β)."""
    rows = re.findall(r"^\| (0(?:\.\d+)?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE.read_text(), re.M)
    assert len(rows) == 4
    for momentum, *bounds in ([float(cell) for cell in row] for row in rows):
        assert bounds[0] == pytest.approx((2 + 2 * momentum) / (1 + 2 * momentum), abs=0.006)
        for workers, bound in zip((1, 3, 8), bounds, strict=True):
            assert radius(workers, momentum, 0.98 * bound) < 1
            assert radius(workers, momentum, 1.02 * bound) > 1
