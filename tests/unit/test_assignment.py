"""Which aggregator is to serve which expert: even within one, and few moves."""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.protocol.assignment import AggregatorBeat, assign, quotas

NAMES = [f"agg-{n}" for n in range(6)]
EXPERTS = [f"e{n:02}" for n in range(20)]

counts = st.integers(min_value=0, max_value=len(EXPERTS))


@st.composite
def federations(draw: st.DrawFn) -> tuple[dict[str, AggregatorBeat], list[str]]:
    """Living aggregators, each of which serves some of the experts, and those nobody else does."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    experts = EXPERTS[: draw(counts)]
    holder = {expert: draw(st.sampled_from([*names, "nobody"])) for expert in experts}
    beats = {
        name: AggregatorBeat(serves=frozenset(e for e in experts if holder[e] == name)) for name in names
    }
    return beats, experts


def counted(assigned: Mapping[str, str], names: Mapping[str, object]) -> list[int]:
    count = Counter(assigned.values())
    return sorted(count[name] for name in names)


def moved(beats: Mapping[str, AggregatorBeat], assigned: Mapping[str, str]) -> int:
    return sum(
        expert in beat.serves for name, beat in beats.items() for expert, to in assigned.items() if to != name
    )


@given(federations())
def test_every_expert_has_one_and_the_counts_differ_by_one_at_most(
    federation: tuple[dict[str, AggregatorBeat], list[str]],
) -> None:
    beats, experts = federation
    assigned = assign(beats, experts)
    assert assigned.keys() == set(experts)
    count = counted(assigned, beats)
    assert count[-1] - count[0] <= 1


@given(federations())
def test_no_assignment_that_is_even_moves_fewer(
    federation: tuple[dict[str, AggregatorBeat], list[str]],
) -> None:
    """A holder must give up what exceeds an even share, and no more: computed here in another way."""
    beats, experts = federation
    low, n_high = divmod(len(experts), len(beats))
    held = sorted((len(beat.serves) for beat in beats.values()), reverse=True)
    fewest = sum(max(0, one - (low + (rank < n_high))) for rank, one in enumerate(held))
    assert moved(beats, assign(beats, experts)) == fewest


@given(federations())
def test_an_assignment_that_was_followed_stays(
    federation: tuple[dict[str, AggregatorBeat], list[str]],
) -> None:
    beats, experts = federation
    assigned = assign(beats, experts)
    followed = {
        name: AggregatorBeat(serves=frozenset(e for e, to in assigned.items() if to == name))
        for name in beats
    }
    assert assign(followed, experts) == assigned


@given(federations(), st.randoms(use_true_random=False))
def test_an_assignment_stays_while_it_is_carried_out(
    federation: tuple[dict[str, AggregatorBeat], list[str]], dice: random.Random
) -> None:
    """One expert after the other is given up, or taken, in any order: what is seen in between changes nothing."""
    beats, experts = federation
    assigned = assign(beats, experts)
    serves = {name: set(beat.serves) for name, beat in beats.items()}
    for expert in dice.sample(experts, len(experts)):
        for name, held in serves.items():
            if name != assigned[expert]:
                held.discard(expert)
        if dice.random() < 0.7:
            serves[assigned[expert]].add(expert)
        seen = {name: AggregatorBeat(serves=frozenset(held)) for name, held in serves.items()}
        assert assign(seen, experts) == assigned


@given(federations(), st.data())
def test_an_expert_goes_to_one_that_is_able_if_there_is_one(
    federation: tuple[dict[str, AggregatorBeat], list[str]], data: st.DataObject
) -> None:
    beats, experts = federation
    beats = {
        name: replace(beat, unable=frozenset(data.draw(st.sets(st.sampled_from(EXPERTS)))))
        for name, beat in beats.items()
    }
    assigned = assign(beats, experts)
    assert assigned.keys() == set(experts)
    for expert, name in assigned.items():
        assert expert not in beats[name].unable or all(expert in beat.unable for beat in beats.values())


@given(federations(), st.data())
def test_limits_hold_where_the_others_have_room(
    federation: tuple[dict[str, AggregatorBeat], list[str]], data: st.DataObject
) -> None:
    """A limited one takes no more than its limit, unless all are at theirs; the sum is always that of the experts."""
    beats, experts = federation
    beats = {
        name: replace(beat, limit=data.draw(st.none() | st.integers(min_value=0, max_value=5)))
        for name, beat in beats.items()
    }
    quota = quotas(beats, len(experts))
    assert sum(quota.values()) == len(experts)
    beyond = [quota[name] - beat.limit for name, beat in beats.items() if beat.limit is not None]
    if any(beat.limit is None for beat in beats.values()):
        assert all(one <= 0 for one in beyond)
    elif max(beyond) > 0:
        assert max(beyond) - min(beyond) <= 1


def test_overdue_experts_are_given_up_first() -> None:
    beats = {
        "fast": AggregatorBeat(),
        "slow": AggregatorBeat(serves=frozenset("abcd"), overdue=frozenset("b"), limit=3),
    }
    assert assign(beats, "abcd")["b"] == "fast"


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "7", '{"serves": 3, "limit": "x"}', '{"limit": -1, "unable": [4]}', "[" * 200_000,
        f'{{"since": 1{"0" * 400}}}', '{"since": NaN}', '{"since": 1e999}',
    ],
)  # fmt: skip
def test_a_malformed_heartbeat_says_nothing(text: str) -> None:
    beat = AggregatorBeat.read(text)
    assert (beat.serves, beat.unable, beat.limit or 0, beat.since) == (frozenset(), frozenset(), 0, 0.0)


def test_a_heartbeat_is_read_as_it_was_written_also_that_of_a_later_release() -> None:
    beat = AggregatorBeat(
        serves=frozenset("ab"),
        unable=frozenset("c"),
        overdue=frozenset("b"),
        limit=3,
        since=12.5,
        software="0.1",
    )
    assert AggregatorBeat.read(beat.to_json()) == beat
    assert AggregatorBeat.read(beat.to_json().replace("{", '{"later": 1, ', 1)) == beat
