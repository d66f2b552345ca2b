"""The exactly-once protocol, searched exhaustively in small federations; and each of its rules shown to be needed.

The names H1 to H16 are those of the ways in which a looser protocol breaks, see `tests/protocol/broken.py`.
E1 and on are those of a server that comes back empty. Larger scopes: `python -m tests.protocol --scope big`.
A rule whose search is long: `python -m tests.protocol --broken H6_pull_by_version`.
"""

import gc
import logging
from collections.abc import Iterator

import pytest

from fedmoe.store.lease import Lease
from tests.protocol.actors import Rules
from tests.protocol.all_broken import ALL_BROKEN
from tests.protocol.broken import WritesBackFolded
from tests.protocol.scopes import SMALL
from tests.protocol.script import forked_memory_is_written_back
from tests.protocol.search import ViolationError, search
from tests.protocol.state import Scope

pytestmark = pytest.mark.timeout(600)  # the largest search takes 45 s on two quiet cores


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Each of thousands of faults would be logged; and millions of tuples hold no cycle for the collector to find."""
    logging.disable(logging.CRITICAL)
    gc.disable()
    yield
    gc.enable()
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", SMALL)
def test_every_state_is_right_and_ends_well(name: str) -> None:
    """Nothing lost, doubled or stuck, whatever happens and in whatever order."""
    found = search(SMALL[name])
    print(f"{name}: {found.states} states in {found.seconds:.1f} s")
    assert found.exhausted


def test_nothing_rests_on_the_lease() -> None:
    """Two aggregators that both believe to hold it, as one may do for a while that has lost it."""
    always = Rules(patches=((Lease, "keep", lambda _: True),))
    assert search(Scope(aggregators=2, units=1), always).exhausted


def test_what_is_written_back_is_a_prefix_of_the_history() -> None:
    """By a trace that is too long for a search to come to."""
    forked_memory_is_written_back(Rules())


def test_without_the_prefix() -> None:
    """What was folded and never committed is written back: a worker's unit is lost, and it is not told."""
    with pytest.raises(ViolationError, match="worker b: unit 0 is 0 times in local"):
        forked_memory_is_written_back(Rules(expert=WritesBackFolded))


RULES = {name: broken for name, broken in ALL_BROKEN.items() if not broken.is_long}
# The federations in which rules are taken out, each once, less those that are searched to their end.
OTHER_SCOPES = {
    name: broken.scope
    for number, (name, broken) in enumerate(RULES.items())
    if broken.scope not in [*SMALL.values(), *(one.scope for one in list(RULES.values())[:number])]
}


@pytest.mark.parametrize("name", RULES)
def test_without_the_rule(name: str) -> None:
    """A rule taken out is found out, by the symptom that is foreseen."""
    broken = ALL_BROKEN[name]
    with pytest.raises(ViolationError) as caught:
        search(broken.scope, broken.rules)
    found = caught.value
    print(f"{name}, {broken.what}: {len(found.trace)} steps, {found.states} states\n{found}")
    assert broken.symptom in found.what


@pytest.mark.parametrize("name", OTHER_SCOPES)
def test_with_all_rules_the_same_federation_is_right(name: str) -> None:
    """So it was the rule, and nothing else, that was missing."""
    search(OTHER_SCOPES[name], limit=3_000)


def test_worker_without_state_directory_killed_and_started_again() -> None:
    """What a killed worker had published may be decided after its successor began."""
    search(Scope(units=1, disk=False, faults={"kill_worker": 1}))
