"""fedmoe.protocol.balance: weights by domain, from committed state alone."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.protocol.balance import LEAST_ACTIVE_VERSIONS, Peers, active_versions, peers_of
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.records import Decided
from fedmoe.protocol.rules import AggregationRules
from fedmoe.protocol.update import UpdateId

BY_DOMAIN = AggregationRules(balance="domain")


def decided(**versions: int) -> dict[str, Decided]:
    """Workers named `domain__name`, with the version of their last decision."""
    return {
        name.replace("__", "."): Decided(id=UpdateId("1-00000000", 1), how="applied", version=version)
        for name, version in versions.items()
    }


def crowd(*counts: int) -> dict[str, Decided]:
    """So many workers of each domain, all active."""
    return decided(**{f"d{domain}__w{n}": 100 for domain, count in enumerate(counts) for n in range(count)})


@pytest.mark.parametrize(("worker", "weight"), [("d0.w3", Fraction(11, 20)), ("d1.w0", Fraction(11, 2))])
def test_ten_workers_of_one_domain_count_as_one_of_another(worker: str, weight: Fraction) -> None:
    """M / (D · n): 11/(2·10) each of the ten, 11/2 the one. In a round of 11, τ = 10, each domain moves by a half."""
    peers = peers_of(GATEWAY, worker, crowd(10, 1), 100, BY_DOMAIN)
    assert peers == Peers(11, float(weight), active=11)
    mine = 10 if worker.startswith("d0") else 1
    assert mine * BY_DOMAIN.factor(10, peers.weight) == pytest.approx(0.5)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_weights_have_the_mean_one_and_domains_the_same_sum(counts: list[int]) -> None:
    """Whatever the numbers of workers."""
    there = crowd(*counts)
    weights = {name: peers_of(GATEWAY, name, there, 100, BY_DOMAIN).weight for name in there}
    assert sum(weights.values()) == pytest.approx(len(there))
    sums = [sum(w for name, w in weights.items() if name.startswith(f"d{n}.")) for n in range(len(counts))]
    assert sums == pytest.approx([len(there) / len(counts)] * len(counts))


def test_who_is_silent_counts_no_more() -> None:
    """From the end of the last of its versions on; a new worker counts from its first update on."""
    there = decided(a__1=1000, a__2=1000 - LEAST_ACTIVE_VERSIONS, b__1=1000)
    assert peers_of(GATEWAY, "a.1", there, 1000, BY_DOMAIN).weight == pytest.approx(3 / 4)
    assert peers_of(GATEWAY, "a.1", there, 1001, BY_DOMAIN).weight == 1.0
    assert peers_of(GATEWAY, "b.2", there, 1001, BY_DOMAIN).weight == pytest.approx(3 / 4)
    assert active_versions(100) == 400


def test_each_worker_counts_the_same_by_default_and_on_every_other_expert() -> None:
    """There a dot in a name, as in that of a host, tells no domain."""
    assert peers_of(GATEWAY, "d0.w0", crowd(10, 1), 100, AggregationRules()) == Peers(11)
    assert peers_of("sql_expert", "b.x", decided(a__x=1, a__y=1, b__x=1), 1, BY_DOMAIN).weight == 1.0


@given(st.floats(0.01, 100), st.integers(0, 1000))
def test_no_weight_lets_an_update_count_more_than_lr(weight: float, staleness: int) -> None:
    """So a lone worker of a domain among many cannot make the gateway unstable."""
    assert 0 < AggregationRules(lr=0.5, gain=2.0).factor(staleness, weight) <= 0.5
