"""What a hazard is: what goes wrong without which rule, the scenario that plays it, and the rule taken out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import consumers.aggregator as aggregator
import producers.membership as membership
from tests.hazards.world import World

Patch = tuple[Any, str, Any]  # what to replace: object, attribute, replacement


@dataclass(frozen=True)
class Hazard:
    """One way in which a looser protocol breaks.

    Args:
        wrong: what goes wrong without the rule.
        rule: what prevents it.
        scenario: plays it on a real server and asserts the outcome.
        without: takes exactly this rule out of the project's code.
        symptom: part of the sentence with which the scenario's own assertion then fails.
        errors: errors without a sentence that a process then meets over and over, if that is how it goes wrong.
    """

    wrong: str
    rule: str
    scenario: Callable[[World], None]
    without: tuple[Patch, ...]
    symptom: str
    errors: frozenset[str] = frozenset()


def of_store(kind: type) -> tuple[Patch, ...]:
    return ((aggregator, "ExpertStore", kind),)


def of_expert(kind: type) -> tuple[Patch, ...]:
    return ((aggregator, "Expert", kind),)


def of_worker_store(kind: type) -> tuple[Patch, ...]:
    return ((membership, "WorkerStore", kind),)
